import dataclasses
import errno
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import polars as pl
import pytest

from conflictscope.cli import main
from conflictscope.study import run as run_module
from interp import evaluation
from interp.conflicts import ConflictSet
from interventions.config import InterventionFile
from interventions.heads import HeadScaling
from interventions.identity import ModelIdentity
from tests.conflictscope import small_studies
from tests.tiny import tiny_conflicts

small = small_studies.small


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the command line in an empty folder; gives its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["conflictscope", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
            sys.exit(0)
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return command


@pytest.fixture
def data(tmp_path):
    tiny_conflicts().save(tmp_path / "tiny.jsonl")
    return tmp_path / "tiny.jsonl"


@pytest.fixture
def tiny(tiny_directories):
    return tiny_directories["llama"]


def test_the_version_is_that_of_the_package(run):
    assert run("--version") == (0, f"conflictscope {version('conflictscope')}\n", "")


def assert_one_sentence(result, *parts):
    code, _, error = result
    assert code == 2
    assert "Traceback" not in error
    sentence = error.strip().splitlines()[-1]
    assert sentence.startswith("Error: ")
    assert all(part in sentence for part in parts)


def save_edit(path, bridge, heads):
    edit = HeadScaling.of(heads, 0.0)
    InterventionFile.of([edit], name="edit", model=ModelIdentity.of(bridge, "tiny")).save(path)


def test_a_wrong_model_name(run):
    assert_one_sentence(run("demo", "--model", "no-such-model"), "no-such-model", "smollm2-135m")


def test_a_wrong_model_directory(run):
    assert_one_sentence(run("demo", "--model", "./nowhere"), "There is no model directory ./nowhere")


def test_an_unknown_relation(run):
    assert_one_sentence(run("demo", "--relation", "capitol"), "'capitol' is not known", "capital")


@pytest.mark.parametrize(
    ("content", "message"), [("", "has no examples"), ("{}\n", "line 1"), ("not json\n", "line 1")]
)
def test_an_empty_or_malformed_data_file(run, tmp_path, tiny, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    assert_one_sentence(run("evaluate", "--model", tiny, "--data", "bad.jsonl"), message)


def test_a_config_for_another_model(run, tmp_path, tiny_directories, tiny_llama, data):
    save_edit(tmp_path / "edit.json", tiny_llama, [(0, 0)])
    result = run("evaluate", "--model", tiny_directories["gpt2"], "--data", data, "--config", "edit.json")
    assert_one_sentence(result, "is for tiny", "GPT2LMHeadModel")
    assert not (tmp_path / "out").exists()


def test_a_head_that_does_not_exist(run, tmp_path, tiny, tiny_llama, data):
    save_edit(tmp_path / "edit.json", tiny_llama, [(1, 0)])
    record = json.loads((tmp_path / "edit.json").read_text())
    record["interventions"][0]["heads"][0]["layer"] = 7
    (tmp_path / "edit.json").write_text(json.dumps(record))
    assert_one_sentence(
        run("evaluate", "--model", tiny, "--data", data, "--config", "edit.json"), "layer 7 does not exist"
    )


def test_an_unknown_column(run, tiny, data):
    assert_one_sentence(run("evaluate", "--model", tiny, "--data", data, "--by", "colour"), "'colour'", "template")


def test_options_that_do_not_go_together(run, tiny, data):
    result = run("attribute", "--model", tiny, "--data", data, "--method", "direct-logits", "--mlps", "frozen")
    assert_one_sentence(result, "belong to path-patching")


def test_all_methods_left_out(run, tiny):
    study = ["compare", "--model", tiny, "--method", "pruning", "--without"]
    assert_one_sentence(run(*study, "pruning"), "No method is left to measure")
    assert_one_sentence(run(*study, "prunning"), "There is no method 'prunning'", "greedy_pruning")


def test_data_and_relation_together(run, tiny, data):
    assert_one_sentence(run("evaluate", "--model", tiny, "--data", data, "--relation", "capital"), "not both")


def test_an_unknown_format(run, data):
    assert_one_sentence(run("data", "convert", data, "--format", "csvish"), "csvish", "nq-swap")


def test_a_malformed_row_stops_the_conversion_with_its_line(run, tmp_path):
    good = {
        "question": "Q?",
        "org_context": "It is A.",
        "sub_context": "It is B.",
        "org_answer": ["A1"],
        "sub_answer": ["B1"],
    }
    (tmp_path / "swap.jsonl").write_text(json.dumps(good) + "\n" + json.dumps({"question": "Q?"}) + "\n")
    assert_one_sentence(run("data", "convert", "swap.jsonl", "--format", "nq-swap"), "line 2")
    assert not (tmp_path / "out").exists()
    code, _, error = run("data", "convert", "swap.jsonl", "--format", "nq-swap", "--on-error", "skip")
    assert code == 0
    assert "skipped 1 rows" in error


def swap(number, **fields):
    return {
        "question": f"Q{number}?",
        "org_context": "It is Ann.",
        "sub_context": f"It is B{number}.",
        "org_answer": ["Ann"],
        "sub_answer": [f"B{number}"],
    } | fields


def test_several_files_are_converted_to_one_set_and_what_is_left_out_is_counted_by_reason(run, tmp_path):
    for name, rows in {"one": [swap(1), swap(1)], "two": [swap(2), swap(3, sub_answer=["the ann"]), swap(1)]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, error = run("data", "convert", "one.jsonl", "two.jsonl", "--format", "nq-swap", "--out", "out.jsonl")
    assert code == 0
    assert "Left out 2 items: an earlier item says the same" in error
    assert "Left out 1 items: the conflict context gives an answer of memory" in error
    assert "two.jsonl, line 2: the conflict context gives an answer of memory" in error
    assert "Wrote 6 examples to out.jsonl" in error
    ids = {json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()}
    assert ids == {f"nq-swap-{name}-1-{kind}" for name in ("one", "two") for kind in ("conflict", "aligned", "none")}


@pytest.mark.parametrize(("markup", "context"), [((), "<P> It is B1 . </P>"), (("--markup", "clean"), "It is B1.")])
def test_markup_is_kept_unless_it_is_to_be_cleaned(run, tmp_path, markup, context):
    (tmp_path / "one.jsonl").write_text(json.dumps(swap(1, sub_context="<P> It is B1 . </P>")))
    assert run("data", "convert", "one.jsonl", "--format", "nq-swap", "--out", "out.jsonl", *markup)[0] == 0
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["contexts"] == [context]


@pytest.mark.parametrize("out", ["two.jsonl", "./folder/../two.jsonl", "link.jsonl"])
def test_a_conversion_onto_its_own_input_is_refused_and_the_input_stays(run, tmp_path, out):
    (tmp_path / "folder").mkdir()
    (tmp_path / "one.jsonl").write_text("{not even JSON")
    (tmp_path / "two.jsonl").write_text("{not even JSON")
    (tmp_path / "link.jsonl").symlink_to("two.jsonl")
    result = run("data", "convert", "one.jsonl", "two.jsonl", "--format", "nq-swap", "--out", out)
    assert_one_sentence(result, "is to be written, but two.jsonl is read from it")
    assert (tmp_path / "two.jsonl").read_text() == "{not even JSON"


def test_inspect_reads_a_file_with_a_byte_order_mark(run, tmp_path, data):
    data.write_bytes(b"\xef\xbb\xbf" + data.read_bytes())
    assert run("data", "inspect", data)[0] == 0


def test_a_disk_that_is_full_at_the_end_of_a_run(small, run, tmp_path, tiny, monkeypatch):
    """The disk fills up while the last files are written: one sentence, no half-written file, finished steps kept."""
    study = ["compare", "--model", tiny, "--relation", "capital", "--method", "pruning", "--quick", "--out", "out"]
    really_fsync, at_the_end = os.fsync, []

    def full(descriptor):
        if at_the_end:
            raise OSError(errno.ENOSPC, "No space left on device")
        really_fsync(descriptor)

    def examples(*arguments):
        at_the_end.append(True)
        really_write_examples(*arguments)

    really_write_examples = run_module.write_examples
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        patched.setattr(run_module, "write_examples", examples)
        assert_one_sentence(run(*study), "No space left on device", "run again")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"records", "interventions"}
    assert not [path for path in (tmp_path / "out").rglob(".*")]
    code, _, error = run(*study)
    assert code == 0
    assert "report.html" in error


def test_evaluate_writes_one_row_per_prompt_of_the_test_split(run, tmp_path, tiny, data):
    code, output, _ = run("evaluate", "--model", tiny, "--data", data, "--by", "template", "--out", "usage.parquet")
    assert code == 0
    assert "memory_rate" in output
    rows = pl.read_parquet(tmp_path / "usage.parquet")
    assert rows["id"].to_list() == [e.id for e in tiny_conflicts() if e.split == "test"]


def test_evaluate_asks_every_split_where_that_is_wanted(run, tmp_path, tiny, data):
    arguments = ("--model", tiny, "--data", data, "--out", "usage.parquet")
    assert run("evaluate", *arguments, "--split", "all")[0] == 0
    assert len(pl.read_parquet(tmp_path / "usage.parquet")) == len(tiny_conflicts())
    assert run("evaluate", *arguments, "--split", "dev")[0] == 0
    assert set(pl.read_parquet(tmp_path / "usage.parquet")["split"]) == {"dev"}


def test_evaluate_asks_about_some_subjects_where_that_is_wanted(run, tmp_path, tiny, data):
    arguments = ("--model", tiny, "--data", data, "--out", "usage.parquet", "--split", "all", "--subjects", "2")
    assert run("evaluate", *arguments)[0] == 0
    rows = pl.read_parquet(tmp_path / "usage.parquet")
    assert rows["subject"].n_unique() == 2
    assert rows["id"].to_list() == [e.id for e in tiny_conflicts() if e.subject in set(rows["subject"])]
    run("evaluate", *arguments, "--seed", "2")
    assert set(pl.read_parquet(tmp_path / "usage.parquet")["subject"]) != set(rows["subject"])


def test_evaluate_says_by_type_whether_conflicts_were_dealt_with_as_expected(run, tmp_path, tiny, data):
    fixture = Path(__file__).parents[2] / "interp" / "fixtures" / "formats" / "conflicts.jsonl"
    assert run("data", "convert", fixture, "--format", "conflicts", "--out", "typed.jsonl")[0] == 0
    arguments = ("evaluate", "--model", tiny, "--split", "all", "--out", "usage.parquet", "--data")
    code, output, _ = run(*arguments, "typed.jsonl")
    assert code == 0
    assert "conflicts-no-conflict" in output
    assert "the newest information" in output
    rows = pl.read_parquet("usage.parquet")
    assert set(rows.drop_nulls("expected")["kind"]) == {"conflict", "aligned"}
    run(*arguments, data)
    assert "expected" not in pl.read_parquet("usage.parquet").columns


def test_evaluate_says_which_splits_there_are(run, tmp_path, tiny):
    some = [e for e in tiny_conflicts() if e.split == "train"]
    ConflictSet("some", tuple(some)).save(tmp_path / "some.jsonl")
    result = run("evaluate", "--model", tiny, "--data", "some.jsonl")
    assert_one_sentence(result, "some has no examples of the split test", f"{len(some)} of train", "--split all")


def test_a_ratio_that_is_undefined_is_said_to_be(run, tmp_path, tiny, data, monkeypatch):
    monkeypatch.setattr(evaluation, "usage_of", lambda *_: "other")
    _, output, _ = run("evaluate", "--model", tiny, "--data", data, "--out", "usage.parquet")
    (line,) = [line for line in output.splitlines() if "memorisation_ratio" in line]
    assert line.count("undefined") == 3


@pytest.mark.parametrize("method", ["path-patching", "direct-logits", "attribution-patching", "edges", "retrieval"])
def test_attribute_writes_scores_and_a_picture(run, tmp_path, tiny, data, method):
    arguments = ["attribute", "--model", tiny, "--data", data, "--method", method, "--out", "heads.parquet"]
    code, output, _ = run(*arguments)
    assert code == 0
    assert "towards" in output
    assert {"heads.parquet", "heads.json", "heads.html"} <= {path.name for path in tmp_path.iterdir()}


def test_attribute_writes_edges_beside_the_heads(run, tmp_path, tiny, data):
    code, output, _ = run("attribute", "--model", tiny, "--data", data, "--method", "edges", "--out", "heads.parquet")
    assert code == 0
    edges = pl.read_parquet(tmp_path / "heads_edges.parquet")
    assert edges.columns == ["sender", "receiver", "score"]
    assert "receiver" in output
    assert edges["receiver"][0] in output


def test_attribute_scores_the_heads_that_a_head_listens_to(run, tmp_path, tiny, data):
    arguments = ["attribute", "--model", tiny, "--data", data, "--method", "head-to-head", "--out", "heads.parquet"]
    assert_one_sentence(run(*arguments), "give --receiver")
    assert_one_sentence(run(*arguments, "--receiver", "last"), "layer.head", "'last'")
    assert_one_sentence(run(*arguments, "--receiver", "0.3"), "layer 0")
    assert_one_sentence(run(*arguments, "--receiver", "1.0", "--tokens", "all"), "--baseline zero")
    everywhere = ("--tokens", "all", "--baseline", "zero")
    for options in ((), everywhere):
        code, output, _ = run(*arguments, "--receiver", "1.0", *options)
        assert code == 0
        assert "through head 1.0" in output


@pytest.mark.parametrize("method", ["attention-drift", "representations"])
def test_attribute_needs_contexts_that_agree_for_what_compares_both(
    run, tmp_path, tiny, data, capital_conflicts, method
):
    arguments = ["attribute", "--model", tiny, "--method", method, "--out", "scores.parquet", "--split", "all"]
    agree = {"attention-drift": "comes with one whose context agrees", "representations": "whose contexts agree"}
    assert_one_sentence(run(*arguments, "--data", data), agree[method])
    some = capital_conflicts.subjects[:4]
    ConflictSet("some", tuple(e for e in capital_conflicts if e.subject in some)).save(tmp_path / "both.jsonl")
    code, output, _ = run(*arguments, "--data", "both.jsonl")
    assert code == 0
    assert {"attention-drift": "drift of attention", "representations": "growth of gap, degrees"}[method] in output
    assert {"scores.parquet", "scores.json", "scores.html"} <= {path.name for path in tmp_path.iterdir()}


def test_attribute_refuses_options_of_another_method(run, tiny, data):
    for options in (("--baseline", "zero"), ("--receiver", "1.0"), ("--tokens", "all"), ("--mlps", "frozen")):
        result = run("attribute", "--model", tiny, "--data", data, "--method", "edges", *options)
        assert_one_sentence(result, options[0], "belong")


def test_models_lists_the_default_and_the_architectures(run):
    code, output, _ = run("models")
    assert code == 0
    assert "smollm2-135m" in output
    assert "Gemma3ForCausalLM" in output


def test_data_build_and_inspect(run, tmp_path):
    assert run("data", "build", "--all-facts", "--relation", "capital", "--out", "c.jsonl")[0] == 0
    code, output, _ = run("data", "inspect", "c.jsonl", "--show", "1")
    assert code == 0
    assert '"subjects": 183,' in output
    assert "The capital of" in output


def test_data_tasks_ask_about_the_subjects_of_a_split(run, tmp_path):
    assert run("data", "build", "--all-facts", "--relation", "capital", "--out", "c.jsonl")[0] == 0
    assert run("data", "tasks", "c.jsonl", "tasks")[0] == 0
    assert run("data", "tasks", "c.jsonl", "dev", "--split", "dev")[0] == 0
    conflicts = ConflictSet.load("c.jsonl").select(kind="conflict")
    for folder, part in (("tasks", conflicts.select(split="test")), ("dev", conflicts.select(split="dev"))):
        rows = Path(folder, "conflictscope_conflict.jsonl").read_text(encoding="utf-8").splitlines()
        assert {json.loads(row)["id"] for row in rows} == {example.id for example in part}
    assert_one_sentence(run("data", "tasks", "c.jsonl", "tasks"), "exists already")


def test_data_inspect_shows_what_is_asked_without_the_context(run, tmp_path):
    examples = tiny_conflicts().examples
    ConflictSet("c", (examples[0], dataclasses.replace(examples[1], bare_prompt=""))).save(tmp_path / "c.jsonl")
    code, output, _ = run("data", "inspect", "c.jsonl")
    assert code == 0
    assert "without context: The capital of Italy is\n" in output
    assert "without context: not known\n" in output


def test_data_inspect_counts_answers_that_are_hard_to_tell_apart(run, tmp_path):
    row = {"id": "0", "subject": "s", "relation": "r", "question": "q", "template": "t", "source": "x", "prompt": "p"}
    row |= {"split": "test", "kind": "conflict", "bare_prompt": "p"}
    pairs = [
        (["Paris"], ["Rome"], "It is Rome."),
        (["The Hague"], ["hague"], "It is The Hague."),
        (["New York"], ["York"], "It is York."),
        (["York"], ["New York"], "It is New York."),
        (["Paris"], ["Rome"], "It is Rome, not Paris."),
    ]
    rows = [
        {**row, "id": str(i), "memory_answers": memory, "context_answers": answers, "contexts": [context]}
        for i, (memory, answers, context) in enumerate(pairs)
    ]
    rows.append(
        {
            **row,
            "id": "aligned",
            "kind": "aligned",
            "memory_answers": ["a"],
            "context_answers": ["a"],
            "contexts": ["a"],
        }
    )
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, output, _ = run("data", "inspect", "c.jsonl", "--show", "0")
    assert code == 0
    assert (
        "Of 5 conflict prompts, 1 have the same answer on both sides, 2 have one answer within the other (the longer "
        "match counts), and 2 have both answers in their context." in output
    )
