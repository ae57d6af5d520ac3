"""Change a forward pass (scale heads, steer, edit features); save such changes, apply them to a transformers model.

Import from the submodules. Nothing here imports transformer_lens or sae_lens: serving needs only torch,
transformers, safetensors and pydantic.
"""
