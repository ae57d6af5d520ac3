import gguf
import numpy as np

from interventions.config import InterventionFile
from tests.conflictscope.cli import test_cli
from tests.conflictscope.cli.test_cli import assert_one_sentence

run = test_cli.run


def vector(path, width=32):
    writer = gguf.GGUFWriter(path, "controlvector")
    for layer in range(3):
        writer.add_tensor(f"direction.{layer}", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_imported_vector_can_be_measured_and_tried(run, tiny_directories, tmp_path):
    name, out = str(tiny_directories["llama"]), tmp_path / "happy.json"
    options = ("--model", name, "--out", out, "--strength", "-2", "--layers", "1-2")
    code, _, said = run("import", vector(tmp_path / "happy.gguf"), *options)
    assert code == 0
    assert "direction after layer 1 (add, strength -2, all tokens); direction after layer 2" in said
    assert [part.edited_layers for part in InterventionFile.load(out).build()] == [{1}, {2}]
    code, shown, _ = run("generate", name, "The capital of Italy is", "--config", out, "--max-new-tokens", 2)
    assert code == 0
    assert "happy" in shown


def test_a_vector_of_another_width_is_refused_and_nothing_is_written(run, tiny_directories, tmp_path):
    path, out = vector(tmp_path / "happy.gguf", width=31), tmp_path / "happy.json"
    result = run("import", path, "--model", str(tiny_directories["llama"]), "--out", out)
    assert_one_sentence(result, "of shape (31,)")
    assert not out.exists()
