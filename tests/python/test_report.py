"""The report of a run: what is read, what the page and the plots show, and every bad input."""

import base64
import json
import math
import re
import struct

import numpy as np
import pytest
import typer
import yaml
from typer.testing import CliRunner

from lemo.cli.report import report
from lemo.report import load_run, plots, write_report
from lemo.report.page import summary_table
from lemo.training.run_log import read_log

# Files of finished runs.
pytestmark = pytest.mark.cpu_only

LAYERS = 4
STEPS = 30


def write_run(folder, keep=0.5, losses=None, tokens=512):
    """A run folder as the trainer leaves it; layers 1 and 2 keep ``keep``, the others all."""
    folder.mkdir(parents=True)
    losses = (
        losses if losses is not None else [3 * math.exp(-step / 10) + 1 for step in range(STEPS)]
    )
    elimination = {"policy": "ratio", "keep": keep, "scorer": "pooled"} if keep < 1 else None
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"context_length": tokens, "elimination": elimination})
    )
    layers = [1.0 if layer in (0, LAYERS - 1) else keep for layer in range(LAYERS)]
    with open(folder / "log.jsonl", "w") as log:
        for step, loss in enumerate(losses, start=1):
            record = {
                "step": step,
                "loss": loss,
                "learning_rate": 1e-4,
                "tokens": tokens,
                "seconds": 2.0 + 0.01 * step,
                "tokens_per_second": tokens / 2.0,
                "peak_memory_bytes": 3 * 2**29,
                "kept_share": sum(layers) / LAYERS,
                "kept": [{"attention": share, "mlp": share} for share in layers],
                "progress": step / len(losses),
            }
            log.write(json.dumps(record) + "\n")
    if keep < 1:
        kept = [list(range(0, 8, 1 if share == 1 else 2)) for share in layers]
        kept_map = {
            "block_size": 64,
            "tokens": tokens,
            "layers": [{"attention": k, "mlp": k} for k in kept],
        }
        (folder / "kept_map.json").write_text(json.dumps(kept_map))
    row = {"kind": "book", "length": 512, "documents": 2}
    row |= {"perplexity": 33.25, "tail_perplexity": 31.5}
    (folder / "metrics.json").write_text(json.dumps([row]))
    return folder


def png_size(data):
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def embedded_images(page):
    return [
        base64.b64decode(text)
        for text in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    ]


def test_settings_that_follow_the_data_are_shown_as_they_were(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_text("elimination:\n  keep: null\n  scorer: auto\n")
    assert summary_table([load_run(folder)])[0] == ("method", ["lemo, auto scores"])
    resolved = {"keep": 0.25, "scorer": "lexical"}
    (folder / "elimination.json").write_text(json.dumps(resolved))
    assert summary_table([load_run(folder)])[0][1] == ["lemo, keep 0.25, lexical scores"]
    (folder / "elimination.json").write_text("[]")
    with pytest.raises(ValueError, match=r"elimination\.json: elimination: expected settings, got"):
        load_run(folder)


def test_run_is_read_as_written(tmp_path):
    run = load_run(write_run(tmp_path / "run"))
    assert run.name == "run"
    assert run.steps == list(range(1, STEPS + 1))
    assert run.tokens == 512 * STEPS
    assert run.final_loss == pytest.approx(sum(3 * math.exp(-s / 10) + 1 for s in (27, 28, 29)) / 3)
    assert run.kept_share == pytest.approx(0.75)
    assert run.peak_memory_bytes == 3 * 2**29
    assert run.median("seconds") == pytest.approx(2.155)
    assert run.kept_by_layer("mlp") == [[1.0] * STEPS, [0.5] * STEPS, [0.5] * STEPS, [1.0] * STEPS]
    assert run.kept_map.blocks == 8
    assert run.kept_map.layers[1]["attention"] == [0, 2, 4, 6]


def test_resumed_log_counts_a_step_once_and_a_half_written_last_line_not_at_all(tmp_path):
    folder = write_run(tmp_path / "run", losses=[4.0, 3.0, 2.0])
    with open(folder / "log.jsonl", "a") as log:
        log.write(json.dumps({"step": 3, "loss": 2.5}) + "\n")
        log.write('{"step": 4, "lo')
    run = load_run(folder)
    assert run.steps == [1, 2, 3]
    assert run.series("loss") == [4.0, 3.0, 2.5]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "broken JSON: Expecting value"),
        ('{"step": 2, "lo\x00ss": 2', "broken JSON: Invalid control character at"),
        ("[1]", "expected a JSON object, got list"),
        ('{"loss": 2}', "field 'step': expected an integer, got None"),
        ('{"step": true, "loss": 2}', "field 'step': expected an integer, got True"),
        ('{"step": 2, "loss": "x"}', "field 'loss': expected a number, got 'x'"),
        (
            '{"step": 2, "loss": 2, "kept": [0.5]}',
            "field 'kept': expected a list of objects, got [0.5]",
        ),
    ],
)
def test_a_broken_line_is_named_and_the_others_are_kept(tmp_path, caplog, line, reason):
    folder = write_run(tmp_path / "run", losses=[4.0, 3.0, 2.0])
    first, _, third = (folder / "log.jsonl").read_text().splitlines()
    (folder / "log.jsonl").write_text(f"{first}\n{line}\n{third}\n")
    run = load_run(folder)
    assert run.steps == [1, 3]
    message = f"log.jsonl: 1 broken line is left out: line 2 ({reason})"
    assert message in caplog.text
    assert ("broken lines of the log", ["1"]) in summary_table([run])
    caplog.clear()
    assert [record["step"] for record in read_log(folder / "log.jsonl")] == [1, 3]
    assert message in caplog.text


def test_steps_that_log_no_layers_kept_everything(tmp_path):
    folder = write_run(tmp_path / "run", losses=[4.0, 3.0])
    with open(folder / "log.jsonl", "a") as log:
        log.write(json.dumps({"step": 3, "loss": 2.5, "kept": []}) + "\n")
    assert load_run(folder).kept_by_layer("attention")[1] == [0.5, 0.5, 1.0]


def test_kept_map_null_stands_for_every_block(tmp_path):
    folder = write_run(tmp_path / "run")
    layers = [{"attention": None, "mlp": [0]}]
    (folder / "kept_map.json").write_text(
        json.dumps({"block_size": 64, "tokens": 130, "layers": layers})
    )
    assert load_run(folder).kept_map.layers == [{"attention": [0, 1, 2], "mlp": [0]}]


def test_report_of_one_run(tmp_path):
    run = load_run(write_run(tmp_path / "run"))
    page_path = write_report([run], tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"index.html", "loss.png", "kept_share.png", "kept_map.png", "resources.png"}
    page = page_path.read_text()
    images = embedded_images(page)
    # Every plot once in dark and once in light colours; the light one is the file.
    assert len(images) == 8
    assert images[1] == (tmp_path / "out" / "loss.png").read_bytes()
    for image in images:
        width, height = png_size(image)
        assert width >= 1000
        assert height >= 300
    for text in (
        "lemo, keep 0.5, pooled scores",
        "75%",
        "1.50 GiB",
        "33.250",
        "31.500",
        "context_length: 512",
    ):
        assert text in page
    # Self-contained: nothing is loaded from elsewhere.
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "url(" not in page
    assert "<script" not in page


def test_comparison_puts_runs_side_by_side(tmp_path):
    lemo_run = load_run(write_run(tmp_path / "a" / "run"))
    dense = load_run(write_run(tmp_path / "b" / "run", keep=1.0))
    page = write_report([lemo_run, dense], tmp_path / "out").read_text()
    assert "a/run" in page
    assert "b/run" in page
    assert dict(summary_table([lemo_run, dense]))["method"] == [
        "lemo, keep 0.5, pooled scores",
        "dense LoRA",
    ]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    # The dense run left out nothing, so it has no plots of what was kept.
    assert written == {
        "index.html",
        "loss.png",
        "resources.png",
        "kept_share_1.png",
        "kept_map_1.png",
    }


def write_relevance(folder, **changes):
    data = {
        "block_size": 64,
        "tokens": 500,
        "scores": [0.1, 0.6, 0.0, 0.2, 0.0, 0.0, 0.1, 0.0],
        "kept": [1, 7],
        "facts": [{"token": 70, "text": "# tree <oak>", "asked": True}],
        "questions": [
            {
                "question": "# which tree",
                "answer": "<oak>",
                "blocks": [
                    {"block": 1, "score": 0.6, "words": ["tree", "<oak>"]},
                    {"block": 7, "score": 0.2, "words": []},
                    {"block": 3, "score": 0.1, "words": ["which"]},
                ],
            }
        ],
    } | changes
    (folder / "relevance.json").write_text(json.dumps(data))


def test_relevance_of_one_prompt_with_what_was_kept_and_why(tmp_path):
    folder = write_run(tmp_path / "run")
    write_relevance(folder)
    run = load_run(folder)
    page = write_report([run], tmp_path / "out").read_text()
    assert (tmp_path / "out" / "relevance.png").is_file()
    assert "500 tokens in 8 blocks of 64" in page
    assert "# which tree <strong>&lt;oak&gt;</strong>" in page
    rows = re.findall(r'<td class="number">([\d, to]+)</td>.*?>(\d+%)<.*?>(yes|no)<', page)
    assert rows == [
        ("64 to 127", "60%", "yes"),
        ("448 to 499", "20%", "yes"),
        ("192 to 255", "10%", "no"),
    ]
    assert "<code>tree, &lt;oak&gt;</code>" in page
    # Drawn from the data: other scores, another picture.
    light = plots.relevance(run.relevance, plots.LIGHT)
    write_relevance(folder, kept=[0, 7])
    assert plots.relevance(load_run(folder).relevance, plots.LIGHT) != light


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": [{}]}, "expected block_size, tokens, scores, kept, facts and questions"),
        (
            {"kept": [8]},
            r"expected 8 scores and blocks in \[0, 8\), got 8 scores and \[1, 3, 7, 8\]",
        ),
        ({"scores": [1.0]}, r"expected 8 scores and blocks in \[0, 8\), got 1 scores"),
    ],
)
def test_relevance_that_does_not_fit(tmp_path, changes, message):
    folder = write_run(tmp_path / "run")
    write_relevance(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_run(folder)


def test_exact_answers_stand_in_a_table_of_their_own(tmp_path):
    row = {"kind": "answers", "length": 4096, "documents": 2, "answers": 8}
    folders = [write_run(tmp_path / name) for name in ("a", "b")]
    text = json.dumps([row | {"exact": 0.875, "right_tokens": 0.9, "perplexity": 1.25}])
    (folders[0] / "metrics.json").write_text(text)
    page = write_report([load_run(folder) for folder in folders], tmp_path / "out").read_text()
    answers, perplexity = page.split("<h2>Held-out perplexity</h2>")
    assert "87.5%" in answers
    assert "1.250" in answers
    assert "33.250" in perplexity
    assert "87.5%" not in perplexity


def cells_of(page, heading):
    """The texts of a table's body, row by row."""
    body = page.split(f"<h2>{heading}</h2>")[1].split("<tbody>")[1].split("</tbody>")[0]
    rows = [re.findall(r"<t[dh][^>]*>([^<]*)", row) for row in body.split("</tr>")]
    return [row for row in rows if row]


def test_a_perplexity_beyond_all_numbers_is_told(tmp_path):
    folder = write_run(tmp_path / "run")
    row = {"kind": "book", "length": 512, "documents": 2, "tail_perplexity": 1.5}
    (folder / "metrics.json").write_text(json.dumps([row | {"perplexity": None}]))
    page = write_report([load_run(folder)], tmp_path / "out").read_text()
    assert cells_of(page, "Held-out perplexity") == [["book", "512", "inf", "1.500"]]


def test_rows_of_several_sources_are_told_apart(tmp_path):
    row = {"kind": "text", "length": 512, "documents": 2, "tail_perplexity": 1.5}
    rows = [row | {"source": f"/data/{n}.jsonl", "perplexity": n + 2.0} for n in range(2)]
    folders = [write_run(tmp_path / name) for name in ("a", "b")]
    for folder, found in zip(folders, (rows, rows[:1])):
        (folder / "metrics.json").write_text(json.dumps(found))
    page = write_report([load_run(folder) for folder in folders], tmp_path / "out").read_text()
    assert cells_of(page, "Held-out perplexity") == [
        ["text (0.jsonl)", "512", "2.000", "1.500", "2.000", "1.500"],
        ["text (1.jsonl)", "512", "3.000", "1.500", "–", "–"],
    ]
    (folders[0] / "metrics.json").write_text(json.dumps(rows[:1]))
    page = write_report([load_run(folder) for folder in folders], tmp_path / "out").read_text()
    [cells] = cells_of(page, "Held-out perplexity")
    assert cells[0] == "text"


def test_plots_of_an_earlier_report_go(tmp_path):
    runs = [load_run(write_run(tmp_path / name)) for name in ("a", "b")]
    out = tmp_path / "out"
    write_report(runs, out)
    plot = (out / "kept_map_2.png").read_bytes()
    assert {path.name for path in out.glob("kept_*.png")} == {
        f"{name}_{number}.png" for name in ("kept_share", "kept_map") for number in (1, 2)
    }
    # Not of a report, or not where reports put it.
    (out / "kept_map_7.png").write_bytes(b"mine")
    (tmp_path / "far.png").write_bytes(plot)
    (out / "kept_map_8.png").symlink_to(tmp_path / "far.png")
    (out / "kept.png").write_bytes(plot)
    write_report(runs[:1], out)
    assert {path.name for path in out.iterdir()} == {
        *("index.html", "loss.png", "resources.png", "kept_share.png", "kept_map.png"),
        *("kept_map_7.png", "kept_map_8.png", "kept.png"),
    }
    assert (tmp_path / "far.png").exists()


def test_names_and_configuration_are_escaped(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_text("model: '<script>alert(1)</script>'\n")
    page = write_report([load_run(folder, name="<b>")], tmp_path / "out").read_text()
    assert "<script>" not in page
    assert "&lt;b&gt;" in page


def test_kept_map_draws_kept_blocks_in_the_kept_colour(tmp_path):
    """The share of pixels of the kept colour is the share of kept blocks."""
    import io

    from matplotlib.image import imread

    run = load_run(write_run(tmp_path / "run", tokens=4096))
    kept = plots.KeptMap(64, 4096, [{"attention": list(range(16)), "mlp": list(range(48))}])
    assert run.kept_map is not None
    image = imread(io.BytesIO(plots.kept_map(kept, plots.LIGHT)))[..., :3]

    def pixels(color, rows):
        rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return (np.abs(image[rows] - rgb).max(-1) < 0.02).sum()

    middle = image.shape[0] // 2
    for rows, share in ((slice(0, middle), 0.25), (slice(middle, None), 0.75)):
        on, off = pixels(plots.LIGHT.kept, rows), pixels(plots.LIGHT.absent, rows)
        assert on / (on + off) == pytest.approx(share, abs=0.03)


def test_same_run_gives_the_same_page(tmp_path):
    run = load_run(write_run(tmp_path / "run"))
    first = write_report([run], tmp_path / "out").read_bytes()
    assert write_report([run], tmp_path / "out").read_bytes() == first


def test_short_and_sparse_logs_still_give_a_report(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    page = write_report([load_run(folder)], tmp_path / "out").read_text()
    assert "final loss (mean of the last tenth of the steps)" in page
    assert "peak memory</th>" not in page


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.jsonl", "", r"log\.jsonl: expected at least one step, got an empty log"),
        (
            "log.jsonl",
            "[1]\nnot json\n",
            r"log\.jsonl: 2 broken lines are left out: line 1 \(expected a JSON object, got list\)"
            r", line 2 \(broken JSON: .*; expected at least one step",
        ),
        ("kept_map.json", "{", r"kept_map\.json: expected JSON, got "),
        (
            "kept_map.json",
            '{"tokens": 4}',
            r"kept_map\.json: expected block_size, tokens and layers, got ",
        ),
        (
            "kept_map.json",
            '{"block_size": 64, "tokens": 64, "layers": [{"attention": [1], "mlp": []}]}',
            r"kept_map\.json: expected kept blocks of layers in \[0, 1\), got \[1\]",
        ),
        ("metrics.json", "{}", r"metrics\.json: expected a list of objects, got dict"),
        ("metrics.json", "[" * 100_000, r"metrics\.json: expected JSON, got "),
        ("metrics.json", "9" * 5000, r"metrics\.json: expected JSON, got "),
        ("metrics.json", "[{}]", r"row 0: field 'kind': expected a text, got None"),
        (
            "metrics.json",
            '[{"kind": "text", "length": 8.5}]',
            r"metrics\.json: row 0: field 'length': expected an integer, got 8\.5",
        ),
        (
            "metrics.json",
            '[{"kind": "text", "length": 8, "exact": "all"}]',
            r"metrics\.json: row 0: field 'exact': expected a number, got 'all'",
        ),
        ("elimination.json", "9" * 5000, r"elimination\.json: expected JSON, got "),
        (
            "elimination.json",
            '{"layerwise": null}',
            r"elimination\.json: layerwise: expected settings, got NoneType",
        ),
        (
            "config.yaml",
            "elimination: 3\n",
            r"config\.yaml: elimination: expected settings, got int",
        ),
        (
            "config.yaml",
            "elimination: {layerwise: [1]}\n",
            r"config\.yaml: layerwise: expected settings, got list",
        ),
        ("plan.json", '{"modes": [], "kept_bytes": [1e999]}', r"plan\.json: expected modes, "),
        (
            "kept_map.json",
            '{"block_size": 1, "tokens": 1e999, "layers": []}',
            r"kept_map\.json: expected block_size, tokens and layers, got OverflowError",
        ),
        (
            "kept_map.json",
            '{"block_size": 8, "tokens": 8, "layers": [{"attention": [[0]], "mlp": []}]}',
            r"kept_map\.json: expected block_size, tokens and layers, got TypeError",
        ),
        ("relevance.json", '{"block_size": 1e999, "questions": []}', r"relevance\.json: expected"),
        ("config.yaml", "- 1\n", r"config\.yaml: expected a mapping of settings, got list"),
        ("config.yaml", "a: [1\n", r"config\.yaml:2: not YAML: "),
        ("config.yaml", "a: " + "[" * 10_000, r"config\.yaml: not YAML: "),
        ("config.yaml", "a: 2026-13-45", r"config\.yaml:1: not YAML: month must be in 1\.\.12"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_run(folder)


def test_missing_run_and_missing_log(tmp_path):
    (tmp_path / "file").touch()
    for name, fault in (("absent", "does not exist"), ("file", "is a file")):
        with pytest.raises(FileNotFoundError, match=f"the folder of a run.*{name}' {fault}"):
            load_run(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"expected the step log .*log\.jsonl"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="runs: expected at least one run"):
        write_report([], tmp_path / "out")


def test_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    run = load_run(write_run(tmp_path / "run"))
    page = write_report([run], tmp_path / "out")
    old = page.read_bytes()

    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report([run], tmp_path / "out")
    assert page.read_bytes() == old
    assert not list((tmp_path / "out").glob(".*"))


def test_command(tmp_path):
    app = typer.Typer()
    app.command()(report)
    folder = write_run(tmp_path / "run")
    result = CliRunner().invoke(app, [str(folder)])
    assert result.exit_code == 0, result.output
    assert str(folder / "report" / "index.html") in result.output.replace("\n", "")
    assert (folder / "report" / "index.html").is_file()
