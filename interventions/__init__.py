"""Change a model's forward pass (scale heads, steer, edit features) or its choice of the next token, and save that.

Import from the submodules. Nothing here imports transformer_lens or sae_lens: serving needs only torch,
transformers, safetensors and pydantic.
"""
