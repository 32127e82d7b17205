"""What is done with a run that was played: ``fedtalora report``, ``compare``, ``export``, ``predict`` and so on."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtalora_flwr.cli.console import console, errors, escaped, fail

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fedtalora_flwr.aggregation import Place
    from fedtalora_flwr.inference.answer import Wish
    from fedtalora_flwr.inference.model import TrainedModel
    from fedtalora_flwr.inference.predict import Item

Cluster = Annotated[int | None, typer.Option(metavar="N", help="Of a run of fl-tac: the model of this cluster.")]
SlotName = Annotated[
    str, typer.Option("--slot", metavar="CLIENT:NUMBER", help="Of local-only, or a stray of fl-tac: this slot's model.")
]


def add_to(cli: typer.Typer) -> None:
    """Add the commands."""
    for command in (report, compare, export, predict, evaluate, answers):
        cli.command()(command)


def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    pictures: Annotated[Path | None, typer.Option(help="Folder for each picture as an .svg file of its own.")] = None,
) -> None:
    """Write RUN/report.html, one file that opens offline; an unfinished run is reported as far as it is."""
    from fedtalora_flwr.report import print_table, read_run, write_report

    print_table(read_run(run_folder), console)
    console.print(
        f"report {write_report(run_folder, pictures=pictures)}", highlight=False, markup=False, soft_wrap=True
    )


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Two or more run folders.")],
    allow_different_partitions: Annotated[
        bool, typer.Option(help="Compare runs whose clients hold different data.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Also write an HTML page.")] = None,
) -> None:
    """Set runs side by side: what differs in their settings, accuracy, forgetting, bytes, time.

    Refuses runs whose clients hold different data, since then a difference says nothing of the method.
    """
    from fedtalora_flwr.report import compare as compare_runs

    comparison = compare_runs(runs, allow_different_partitions=allow_different_partitions, out=out)
    console.print(comparison.table())
    if out:
        console.print(f"comparison {out.resolve()}", highlight=False, markup=False, soft_wrap=True)


def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    to: Annotated[str, typer.Option(metavar="merged|peft", help="Plain weights, or an adapter for peft.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; by default RUN/export/merged or /peft.")] = None,
    force: Annotated[bool, typer.Option(help="Replace an earlier export in that folder.")] = False,
    cluster: Cluster = None,
    slot: SlotName = "",
) -> None:
    """Write a run's model for use without fedtalora.

    merged: one model with everything in its weights, which timm or transformers loads.

    peft: an adapter that peft loads onto the untouched backbone; the residual is carried as extra rank.

    The folder says in its README.md what it holds, and its load.py classifies files without fedtalora. It is put in
    place only when that program gives the run's logits on 200 random inputs, to 1e-5, or 1e-5 of the largest logit
    where that is above 1.
    """
    from fedtalora_flwr.inference.export import export as export_model

    done = export_model(run_folder, to=to, target=out, force=force, place=_place(cluster, slot))
    console.print(f"model {done.standing}", highlight=False, markup=False, soft_wrap=True)
    measured = f"at most {done.logit_difference:.1e}, the largest of them is {done.largest_logit:.1f}"
    console.print(f"logits differ from the run's by {measured}", highlight=False)
    console.print(f"{to} {done.folder}", highlight=False, markup=False, soft_wrap=True)


def predict(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    inputs: Annotated[list[str], typer.Argument(metavar="FILES...", help="Files and folders; - is standard input.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array instead of lines.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Classes to name for each input.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a language model's answer: tokens, at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, help="Of a language model: 0 takes the likeliest token each time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of a language model's draws, with a temperature.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    cluster: Cluster = None,
    slot: SlotName = "",
) -> None:
    """Classify files with a run's model: a line for each input, the likeliest classes and their probabilities.

    A language model answers each text; on a terminal the words come as they are found.

    Images: files, folders of them at any depth, or one image on standard input.

    Texts: .txt (a text a line), .csv, .tsv, .json, .jsonl (a column text, or the run's input-column), folders of
    these, or lines on standard input: echo "what is my balance" | fedtalora predict RUN -

    Pairs of texts: a line with a tab between the two, two columns (sentence1 and sentence2, or the run's
    input-column), or a list of two in JSON.

    An input that cannot be read is named on standard error, or is an entry with "error" in the JSON array; the others
    are classified all the same, and the exit status is 1.
    """
    import json

    from fedtalora_flwr.inference.answer import Wish
    from fedtalora_flwr.inference.model import open_trained
    from fedtalora_flwr.inference.predict import predict as classify
    from fedtalora_flwr.inference.predict import read_items

    # The name of a file may be no Unicode; a question mark stands for what cannot be printed.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    trained = open_trained(run_folder, device=device, place=_place(cluster, slot))
    if trained.server_round < trained.num_rounds:
        errors.print(f"[yellow]note:[/yellow] the run is {trained.standing}", highlight=False, soft_wrap=True)
    items = read_items(
        inputs,
        modality=trained.model.backbone.modality,
        stdin=sys.stdin.buffer,
        column=trained.config.input_column,
        num_texts=trained.num_texts,
    )
    if trained.model.backbone.modality == "instruction":
        _print_answers(trained, items, Wish(max_new_tokens, temperature, seed), as_json=as_json)
        return
    predictions = classify(trained, items, top=top)
    if as_json:
        found = [prediction.to_json() for prediction in predictions]
        print(json.dumps(found, indent=1, ensure_ascii=sys.stdout.encoding.lower() not in ("utf-8", "utf8")))
        if any("error" in entry for entry in found):
            raise typer.Exit(1)
        return
    failed = False
    for prediction in predictions:
        if prediction.item.error:
            failed = True
            errors.print(f"[red]error:[/red] {escaped(prediction.item.error)}", highlight=False, soft_wrap=True)
            continue
        ranking = [f"{name} {probability:.3f}" for name, probability in prediction.ranking]
        texts = [" ".join(text.split()) for text in prediction.item.texts]
        print(prediction.item.name, *ranking, *texts, sep="\t")
    if failed:
        raise typer.Exit(1)


def evaluate(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    data: Annotated[Path, typer.Argument(metavar="FOLDER|TABLE", help="Labelled examples, of the run's kind.")],
    out: Annotated[Path | None, typer.Option(help="Also write the figures: a .json file, or an .html page.")] = None,
    input_column: Annotated[str, typer.Option(help="Of tables; by default the run's, or a usual name.")] = "",
    label_column: Annotated[str, typer.Option(help="Of tables; by default the run's, or a usual name.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    cluster: Cluster = None,
    slot: SlotName = "",
) -> None:
    """Score a run's model on labelled data of your own: by class, mix-ups, macro F1, balanced accuracy, calibration.

    A folder holds a subfolder of images, or a text file, for each class; a table (.csv, .tsv, .json, .jsonl,
    .parquet) a column of labels. Classes are matched by name; examples of one that the model does not know are left
    out, and counted.

    An example that cannot be read is named on standard error, and the exit status is 1.
    """
    import json

    from fedtalora_flwr.inference.evaluation import evaluate as judge
    from fedtalora_flwr.inference.evaluation import read_labelled
    from fedtalora_flwr.inference.model import open_trained
    from fedtalora_flwr.report import evaluation_tables, write_evaluation
    from fedtalora_flwr.report.html import write_whole

    if out and out.suffix.lower() not in (".json", ".html"):
        fail(f"--out takes a .json or an .html file, got {out.name}")
    trained = open_trained(run_folder, device=device, place=_place(cluster, slot))
    labelled = read_labelled(data, trained, input_column=input_column, label_column=label_column)
    found = judge(trained, labelled).to_json()
    console.print(f"model {trained.standing}", highlight=False, soft_wrap=True)
    console.print(evaluation_tables(found))
    if out and out.suffix.lower() == ".json":
        said = {"run": str(trained.record.path), "data": str(data), "server_round": trained.server_round, **found}
        write_whole(out, json.dumps(said, indent=1) + "\n")
    elif out:
        title, subtitle = f"{trained.record.name} on {data.name}", f"model {trained.standing} · {data.resolve()}"
        write_evaluation(out, found, title=title, subtitle=subtitle)
    if out:
        console.print(f"evaluation {out.resolve()}", highlight=False, markup=False, soft_wrap=True)
    for reason in found["unread"]:
        errors.print(f"[red]error:[/red] {escaped(reason)}", highlight=False, soft_wrap=True)
    if found["unread"]:
        raise typer.Exit(1)


def _print_answers(trained: "TrainedModel", items: "Iterator[Item]", wish: "Wish", *, as_json: bool) -> None:
    """Print what a language model answers, or an array of it; exit with 1 if a prompt cannot be read."""
    import json

    from fedtalora_flwr.inference.answer import answer_items

    streams = sys.stdout.isatty() and not as_json
    on_text = (lambda text: print(text, end="", flush=True)) if streams else None
    entries, failed = [], False
    for item, text in answer_items(trained, items, wish, on_text=on_text):
        failed = failed or bool(item.error)
        if as_json:
            entries.append({"input": item.name, **({"error": item.error} if item.error else {"answer": text})})
        elif item.error:
            errors.print(f"[red]error:[/red] {escaped(item.error)}", highlight=False, soft_wrap=True)
        else:
            print("" if streams else f"{item.name}\t{' '.join(text.split())}")
    if as_json:
        print(json.dumps(entries, indent=1, ensure_ascii=sys.stdout.encoding.lower() not in ("utf-8", "utf8")))
    if failed:
        raise typer.Exit(1)


def answers(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder of a language model.")],
    each: Annotated[int, typer.Option(min=1, help="Held-out prompts of each task.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws, with a temperature.")] = 0,
    score_with: Annotated[
        str, typer.Option(metavar="COMMAND", help="Scores answers: JSON lines in, a number a line out.")
    ] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    cluster: Cluster = None,
    slot: SlotName = "",
) -> None:
    """Let a run's language model answer prompts that nobody was trained on, before and after, and score the answers.

    RUN/answers.json gets every answer and, by task, the mean of ROUGE-L (an F-measure in [0, 1]) against the expected
    one, and the mean loss of a token (nats) over all test answers. The report of the run shows them.

    A command of yours may score the answers too: it reads lines like {"task", "prompt", "expected", "answer"}.
    """
    from rich.table import Table

    from fedtalora_flwr.inference import held_out
    from fedtalora_flwr.inference.answer import Wish
    from fedtalora_flwr.inference.model import open_trained

    wish = Wish(max_new_tokens, temperature, seed)
    trained = open_trained(run_folder, device=device, place=_place(cluster, slot))
    found = held_out.held_out_answers(trained, wish, each=each, on_task=lambda name: errors.print(f"answers {name}"))
    losses = held_out.held_out_losses(trained)
    if score_with:
        found = held_out.scored_by(score_with, found)
    columns = ["loss_before", "loss", "rouge_l_before", "rouge_l", *(["score"] if score_with else [])]
    headings = {"loss_before": "loss before", "rouge_l_before": "ROUGE-L before", "rouge_l": "ROUGE-L"}
    table = Table("task", "answers", *(headings.get(column, column) for column in columns))
    for task in held_out.by_task(found, losses):
        numbers = [f"{task[column]:.3f}" for column in columns]
        table.add_row(", ".join(task["classes"]), str(task["num_answers"]), *numbers)
    console.print(table)
    path = held_out.write_answers(trained.record.path, found, losses, wish)
    console.print(f"answers {path}", highlight=False, markup=False, soft_wrap=True)


def _place(cluster: int | None, slot: str) -> "Place":
    """Say whose model is wanted of a run over slots."""
    if not slot:
        return cluster
    from fedtalora_flwr.aggregation import Slot

    client, _, number = slot.partition(":")
    if cluster is not None or not (client.isdecimal() and number.isdecimal()):
        fail(f"--slot takes CLIENT:NUMBER, as 0:1, and no --cluster beside it; got {slot!r}")
    return Slot(int(client), int(number))
