"""The folder of `lemo prepare`: written whole, read back, refused when damaged; the command."""

import contextlib
import json
import shutil
import string

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import lemo
from lemo import predictors, reference
from lemo.cli.main import main
from lemo.packing.blocks import BlockLayout
from lemo.predictors import storage
from lemo.preparation.documents import _Windows
from lemo.preparation.evaluation import elimination_loss
from lemo.preparation.pipeline import prepare
from lemo.preparation.windows import Window
from lemo.settings.preparation import PredictorSettings, PrepareConfig
from lemo.training.model import load_tokenizer
from limits import largest_file
from tiny import save_tiny_llama, write_documents
from tiny_models import VOCABULARY, make_model

BLOCK = 4
SETTINGS = PredictorSettings(
    block_size=BLOCK,
    dense_layers=(0,),
    search_windows=1,
    keep=0.5,
    steps=6,
    windows_per_step=2,
    prune_every=2,
)

# A folder and its files; test_predictors_device.py prepares a model on the device of the suite.
pytestmark = pytest.mark.cpu_only


def windows(count, seed, tokens=46):
    g = torch.Generator("cpu").manual_seed(seed)
    return [
        Window("ab"[i % 2], torch.randint(3, VOCABULARY, (tokens,), generator=g))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model, folder, description) of one preparation."""
    folder = tmp_path_factory.mktemp("prepared") / "predictor"
    with torch.device("cpu"):
        model = make_model("llama")
        description = prepare(model, windows(4, 0), windows(2, 1), folder, SETTINGS)
    return model, folder, description


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "copy")


def edit(folder, **fields):
    file = folder / "predictor.json"
    description = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in description.items() if v is not None}))


def test_folder_holds_what_was_promised(made):
    model, folder, description = made
    assert sorted(file.name for file in folder.iterdir()) == [
        "predictor.json",
        "predictor.safetensors",
    ]
    assert [file.name for file in folder.parent.iterdir()] == ["predictor"]
    written = json.loads((folder / "predictor.json").read_text())
    assert {k: written[k] for k in description if k != "settings"} == {
        k: v for k, v in description.items() if k != "settings"
    }
    tensors = load_file(folder / "predictor.safetensors")
    weights = {name: t for name, t in tensors.items() if ".profile." not in name}
    assert len(weights) == 3 * (6 + 3)
    assert all(t.dtype == torch.bfloat16 for t in weights.values())
    assert written["parameters"] == sum(t.numel() for t in weights.values())
    assert written["bytes"] == 2 * written["parameters"]
    assert written["model_bytes"] == 4 * sum(p.numel() for p in model.parameters())
    assert written["lengths"] == [46]
    for layer in written["layers"]:
        for kind in ("attention", "mlp"):
            assert 0 <= layer[kind]["recall"] <= 1
            assert sorted(layer[kind]["recall_by_kind"]) == ["a", "b"]
    kept = written["threshold_search"]["kept_share"]
    for kind in ("attention", "mlp"):
        # Layer 0 is dense in the search; the others share the budget of 24 blocks each.
        assert sum(kept[kind][1:]) / 2 == pytest.approx(0.5, abs=1 / 48 + 1e-6)
    losses = written["threshold_search"]["losses"]
    assert losses == sorted(losses, reverse=True)


def extended(followers, knots, values):
    """Linear in the logarithm between the knots, and as the last piece beyond them."""
    x, places = numpy.log2(followers), numpy.log2(knots)
    result = numpy.interp(x, places, values)
    if len(knots) > 1:
        slope = (values[-1] - values[-2]) / (places[-1] - places[-2])
        result += slope * numpy.maximum(x - places[-1], 0)
    return result


def test_scores_are_the_references(made):
    model, folder, _ = made
    loaded = predictors.load(folder, model_config=model.config)
    tensors = {name: t.float() for name, t in load_file(folder / "predictor.safetensors").items()}
    layout = BlockLayout.from_seqlens([46, 9], BLOCK)
    x = torch.randn(layout.num_tokens, 32)
    for kind, nets in (("attention", ("key", "query")), ("mlp", ("key",))):
        stem = f"layers.2.{kind}"
        args = [tensors[f"{stem}.{net}.{m}"] for net in nets for m in ("down", "mid", "up")]
        args += [None] * (6 - len(args))
        content = reference.predictor(x, *args, layout.block_starts, layout.cu_blocks)
        knots, mean, deviation = (
            tensors[f"{stem}.profile.{name}"].numpy() for name in ("knots", "mean", "deviation")
        )
        followers = [12 - i for i in range(12)] + [3, 2, 1]
        spread = numpy.maximum(extended(followers, knots, deviation), deviation.min())
        expected = extended(followers, knots, mean) + spread * content.numpy()
        scores = loaded.scores(2, kind, x, layout)
        torch.testing.assert_close(scores, torch.tensor(expected).float(), rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loaded.scores(2, kind, x, layout), scores)


def test_scores_follow_the_cut_of_the_rows(made):
    _, folder, _ = made
    x = torch.randn(46, 32)
    layouts = [BlockLayout.from_seqlens(lengths, BLOCK) for lengths in ([46], [30, 16], [46])]
    loaded = predictors.load(folder)
    for layout in layouts:
        fresh = predictors.load(folder)
        for kind in ("attention", "mlp"):
            for _ in range(2):
                scores = loaded.scores(1, kind, x, layout)
                assert torch.equal(scores, fresh.scores(1, kind, x, layout))


def test_a_model_eliminates_with_the_folder(made):
    model, folder, description = made
    config = lemo.LemoConfig(
        block_size=BLOCK,
        scorer="predictor",
        predictor=str(folder),
        mask_loss=False,
        layerwise={"policy": "threshold", "dense_layers": (0,), "select_at": "all"},
    )
    loss = elimination_loss(model, windows(2, 1)[:1], config)
    # The folder's own thresholds are those that the search ended with.
    assert loss == pytest.approx(description["threshold_search"]["losses"][-1], rel=1e-6)
    ids = windows(2, 1)[0].ids[None]
    with torch.no_grad():
        dense = model(input_ids=ids, labels=ids).loss.item()
    assert abs(loss - dense) > 1e-3
    low = {"thresholds": [-1e9] * 3, "mlp_thresholds": [-1e9] * 3}
    everything = config.replace(layerwise=config.layerwise.replace(**low))
    assert elimination_loss(model, windows(2, 1)[:1], everything) == pytest.approx(dense, rel=1e-5)
    assert all(module.training for module in model.modules())
    assert "forward" not in vars(model)


def test_equal_runs_give_equal_files(made, tmp_path):
    model, folder, _ = made
    prepare(model, windows(4, 0), windows(2, 1), tmp_path / "again", SETTINGS)
    for name in ("predictor.json", "predictor.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_content_target_leaves_the_place_out(tmp_path):
    settings = PredictorSettings(
        block_size=BLOCK,
        target="content",
        search_rounds=0,
        steps=2,
        windows_per_step=2,
    )
    description = prepare(make_model("opt"), windows(3, 0), windows(2, 1), tmp_path / "p", settings)
    tensors = load_file(tmp_path / "p" / "predictor.safetensors")
    assert tensors["layers.1.attention.profile.mean"].shape == (1,)
    assert description["target"] == "content"
    assert description["threshold_search"]["losses"] == []


def test_output_is_not_replaced_unless_asked(made, tmp_path):
    model, folder, _ = made
    with pytest.raises(FileExistsError, match=r"output: .* exists"):
        prepare(model, windows(4, 0), windows(2, 1), folder, SETTINGS)
    target = shutil.copytree(folder, tmp_path / "old")
    (target / "predictor.json").write_text("old")
    left_behind = tmp_path / ".old.tmp" / "features"
    left_behind.mkdir(parents=True)
    prepare(model, windows(4, 0), windows(2, 1), target, SETTINGS, overwrite=True)
    assert predictors.load(target).num_layers == 3
    assert [file.name for file in tmp_path.iterdir()] == ["old"]


def test_what_a_killed_run_had_moved_away_is_put_back(made, tmp_path):
    model, folder, _ = made
    target, aside = tmp_path / "p", tmp_path / ".p.old"
    shutil.copytree(folder, aside)
    with pytest.raises(FileExistsError, match=r"output: .* exists"):
        prepare(model, windows(4, 0), windows(2, 1), target, SETTINGS)
    assert predictors.load(target).num_layers == 3
    target.rename(aside)

    def stop(stage, done, total, message):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(model, windows(4, 0), windows(2, 1), target, SETTINGS, True, report=stop)
    assert predictors.load(target).num_layers == 3
    assert [file.name for file in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize("neighbours", [[], ["predictor.json", "predictor.safetensors"]])
def test_overwrite_replaces_nobody_elses_folder(made, tmp_path, neighbours):
    model, folder, _ = made
    target = tmp_path / "work"
    target.mkdir()
    for name in neighbours:
        shutil.copy(folder / name, target)
    file = target / "thesis.tex"
    file.write_text("years of work")
    expected = r"output: expected a folder with nothing but .* got .*work'; nothing is replaced"
    with pytest.raises(FileExistsError, match=expected):
        prepare(model, windows(4, 0), windows(2, 1), target, SETTINGS, overwrite=True)
    with pytest.raises(FileExistsError, match=r"expected a folder .* got .*thesis\.tex'"):
        prepare(model, windows(4, 0), windows(2, 1), file, SETTINGS, overwrite=True)
    assert {entry.name for entry in target.iterdir()} == {*neighbours, "thesis.tex"}
    assert [file.name for file in tmp_path.iterdir()] == ["work"]


@pytest.mark.parametrize("stage", ["exact scores", "predictors", "thresholds"])
def test_failure_leaves_nothing_behind(made, tmp_path, stage):
    model, _, _ = made

    def fail(at, done, total, message):
        if at == stage:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        prepare(model, windows(4, 0), windows(2, 1), tmp_path / "p", SETTINGS, report=fail)
    assert list(tmp_path.iterdir()) == []
    assert all(module.training for module in model.modules())
    assert "forward" not in vars(model)


def test_failing_write_leaves_the_old_folder(made, tmp_path):
    model, folder, _ = made
    target = shutil.copytree(folder, tmp_path / "p")
    before = {file.name: file.read_bytes() for file in target.iterdir()}

    with contextlib.ExitStack() as until_the_end:

        def fill_disk(stage, done, total, message):
            # The files of the inputs, larger than the weights, are complete by then.
            if stage == "predictors" and done == total:
                until_the_end.enter_context(largest_file(1000))

        with pytest.raises(OSError, match="File too large"):
            prepare(model, windows(4, 0), windows(2, 1), target, SETTINGS, True, report=fill_disk)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["p"]


def test_unfit_windows_and_settings_are_named(made, tmp_path):
    model, _, _ = made
    good, output = windows(2, 0), tmp_path / "p"
    with pytest.raises(ValueError, match="held_out: expected at least one window"):
        prepare(model, good, [], output, SETTINGS)
    with pytest.raises(ValueError, match="training: expected windows of at least 3 blocks"):
        prepare(model, windows(1, 0, tokens=2 * BLOCK), good, output, SETTINGS)
    deep, stages = PredictorSettings(block_size=BLOCK, dense_layers=(3,)), []
    with pytest.raises(ValueError, match="dense_layers: expected layers of a model with 3, got 3"):
        prepare(model, good, good, output, deep, report=lambda *stage: stages.append(stage))
    # Found before any work, not at its end.
    assert stages == []
    small = PredictorSettings(block_size=BLOCK, disk_gib=1e-6, dense_layers=(0,))
    with pytest.raises(ValueError, match=r"disk_gib: 184 .* take \d\.\d+e-05 GiB .* is 1e-06 GiB"):
        prepare(model, good, good, output, small)
    with pytest.raises(ValueError, match="target: expected one of exact, content"):
        PredictorSettings(target="labels")
    with pytest.raises(ValueError, match=r"rank: expected an integer in .* or null, got 0"):
        PredictorSettings(rank=0)
    assert not output.exists()


def test_a_folder_whose_target_has_its_earlier_name_loads(made, copy):
    edit(copy, target="label")
    loaded = predictors.load(copy)
    assert loaded.description == predictors.load(made[1]).description
    assert loaded.description["target"] == "exact"


def test_absent_folder_and_files(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="predictor: expected a folder written by 'lemo"):
        predictors.load(tmp_path / "nowhere")
    (copy / "predictor.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"predictor\.safetensors does not exist"):
        predictors.load(copy)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_weights(copy, damage):
    file = copy / "predictor.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 255
    file.write_bytes({"cut": data[:-100], "flip": data, "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"predictor\.safetensors does not match its checksum"):
        predictors.load(copy)


def reseal(folder, tensors):
    save_file(tensors, folder / "predictor.safetensors")
    sha256 = storage._digest((folder / "predictor.safetensors").read_bytes())
    edit(folder, sha256=sha256, digest=None)


def test_wrong_tensors(copy):
    tensors = load_file(copy / "predictor.safetensors")
    name = "layers.1.mlp.key.down"
    reseal(copy, {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(ValueError, match=f"lacks the tensor '{name}'"):
        predictors.load(copy)
    reseal(copy, tensors | {name: tensors[name][:, :5].contiguous()})
    with pytest.raises(ValueError, match=rf"'{name}': expected \[rank, 32\], got \[8, 5\]"):
        predictors.load(copy)
    reseal(copy, tensors | {name: tensors[name] * float("nan")})
    with pytest.raises(ValueError, match=f"'{name}' is not finite"):
        predictors.load(copy)
    reseal(copy, tensors | {name: tensors[name].int()})
    with pytest.raises(ValueError, match=f"'{name}' is not finite floats"):
        predictors.load(copy)
    reseal(copy, tensors | {name: tensors[name][:3].contiguous()})
    with pytest.raises(ValueError, match=r"expected \[rank, 3\], got"):
        predictors.load(copy)
    profile = "layers.0.mlp.profile.knots"
    reseal(copy, tensors | {profile: tensors[profile][:0]})
    with pytest.raises(ValueError, match="'layers.0.mlp.profile': expected vectors of one length"):
        predictors.load(copy)
    (copy / "predictor.safetensors").write_bytes(b"no tensors at all")
    edit(copy, sha256=storage._digest(b"no tensors at all"), digest=None)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        predictors.load(copy)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "other"}, "was not written by 'lemo prepare'"),
        ({"version": 9}, "expected format version 2, got 9"),
        ({"version": 1}, "expected format version 2, got 1; run 'lemo prepare' again"),
        ({"block_size": "64"}, "field 'block_size': expected int, got '64'"),
        ({"thresholds": None}, "field 'thresholds': expected dict, got None"),
        (
            {"thresholds": {"attention": [1, 2, 3], "mlp": [1]}},
            r"field 'thresholds\.mlp': expected 3 numbers, got \[1\]",
        ),
    ],
)
def test_wrong_description(copy, fields, message):
    edit(copy, **fields)
    with pytest.raises(ValueError, match=message):
        predictors.load(copy)


def test_broken_json(copy):
    file = copy / "predictor.json"
    for content in (file.read_text()[:50], "[" * 100000):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"predictor\.json: expected JSON, got "):
            predictors.load(copy)


def test_another_model_is_refused(made):
    _, folder, _ = made
    deeper = make_model("llama", num_hidden_layers=2).config
    with pytest.raises(ValueError, match="num_layers 3, got one with num_layers 2"):
        predictors.load(folder, deeper)
    with pytest.raises(ValueError, match="model_type 'llama', got one with model_type 'opt'"):
        predictors.load(folder, make_model("opt").config)
    for name, old, new in (
        ("vocab_size", VOCABULARY, 64),
        ("num_attention_heads", 4, 8),
        ("num_key_value_heads", 2, 4),
        ("intermediate_size", 48, 64),
    ):
        with pytest.raises(ValueError, match=f"with {name} {old}, got one with {name} {new}; run"):
            predictors.load(folder, make_model("llama", **{name: new}).config)
    loaded = predictors.load(folder)
    layout = BlockLayout.from_seqlens([32], 8)
    with pytest.raises(ValueError, match="expected blocks of 4 tokens"):
        loaded.scores(0, "mlp", torch.zeros(32, 32), layout)
    with pytest.raises(ValueError, match="layer, kind: expected a layer below 3"):
        loaded.scores(3, "mlp", torch.zeros(32, 32), BlockLayout.from_seqlens([32], 4))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    with torch.device("cpu"):
        save_tiny_llama(folder / "model", layers=2)
    write_documents(folder / "documents.jsonl", count=6)
    return folder


def command(sources, *extra):
    return [
        "prepare",
        *("--model", str(sources / "model"), "--documents", str(sources / "documents.jsonl")),
        *("--block-size", "8", "--steps", "3", "--windows", "3", "--held-out-windows", "2"),
        *extra,
    ]


def run(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code or 0


def test_command_writes_a_folder_that_loads(sources, tmp_path, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text("steps: 99\nkeep: 0.4\nwindows_per_step: 2\n")
    output = tmp_path / "deep" / "predictor"
    extra = ["--config", str(settings), "--lengths", "64,96", "--output", str(output)]
    # --steps 3 on the command line goes over the file, --set over both.
    extra += ["--set", "prune_every=1", "--set", "windows=2"]
    assert run(command(sources, *extra, "--dense-layers", "0")) == 0
    printed = capsys.readouterr().out
    assert "mean recall: attention" in printed
    assert "of the model's bytes" in printed
    assert "threshold search: loss" in printed
    loaded = predictors.load(output)
    training = loaded.description["settings"]
    assert (training["steps"], training["keep"], training["prune_every"]) == (3, 0.4, 1)
    assert loaded.description["lengths"] == [64, 96]
    assert loaded.description["windows"] == {"training": 4, "held_out": 4}
    assert (loaded.num_layers, loaded.hidden_size, loaded.block_size) == (2, 32, 8)


def test_one_long_document_is_cut_in_two(sources, tmp_path):
    text = tmp_path / "one.txt"
    text.write_text("word " * 400)
    output = tmp_path / "p"
    extra = ["--documents", str(text), "--lengths", "64", "--output", str(output)]
    assert run(command(sources, *extra, "--search-rounds", "0")) == 0
    assert predictors.load(output).num_layers == 2


def cut_in_two(sources, documents, **settings):
    """(texts to train on, texts to test on) of documents of one window each."""
    tokenizer = load_tokenizer(str(sources / "model"))
    given = {"model": "m", "output": "o", "lengths": (12,), "windows": 100, "held_out_windows": 100}
    config = PrepareConfig(documents=str(documents), **given, **settings)
    parts = _Windows(config, tokenizer, 257).cut()
    return [[tokenizer.decode(window.ids) for window in part] for part in parts]


def texts(path, contents, kind="text"):
    """A file of documents, one for each text."""
    rows = [{"id": f"{i}", "kind": kind, "text": text} for i, text in enumerate(contents)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("seed", range(3))
def test_copies_of_a_document_are_on_one_side(sources, tmp_path, seed):
    """Twelve letters are a window; the documents are twenty, three times each."""
    different = [letter * 12 for letter in string.ascii_letters[:20]]
    path = texts(tmp_path / "copies.jsonl", 3 * different)
    training, held_out = cut_in_two(sources, path, seed=seed)
    assert len(set(held_out)) == 2
    assert len(set(training)) == 18
    assert not {*training} & {*held_out}
    assert cut_in_two(sources, path, seed=seed) == [training, held_out]


def test_documents_without_copies_are_held_out_as_ever(sources, tmp_path):
    different = [letter * 12 for letter in string.ascii_letters[:20]]
    once, twice = tmp_path / "once.jsonl", tmp_path / "twice.jsonl"
    of_once = cut_in_two(sources, texts(once, different))
    of_twice = cut_in_two(sources, texts(twice, [text for text in different for _ in range(2)]))
    assert [{*part} for part in of_once] == [{*part} for part in of_twice]


def test_copies_of_one_document_are_cut_in_two(sources, tmp_path):
    path = texts(
        tmp_path / "copies.jsonl", 3 * [string.digits + string.ascii_letters + string.punctuation]
    )
    training, held_out = cut_in_two(sources, path)
    assert held_out
    assert not {*training} & {*held_out}


def test_what_is_given_to_test_on_is_not_trained_on(sources, tmp_path):
    documents = texts(tmp_path / "d.jsonl", [letter * 12 for letter in "abcdef"])
    tests = texts(tmp_path / "t.jsonl", [letter * 12 for letter in "exc"], "other")
    training, held_out = cut_in_two(sources, documents, held_out_documents=str(tests))
    assert {*training} == {letter * 12 for letter in "abdf"}
    assert {*held_out} == {letter * 12 for letter in "exc"}
    with pytest.raises(ValueError, match="held_out_documents: expected others than those to train"):
        cut_in_two(sources, documents, held_out_documents=str(documents))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--lengths", "64"], "output: expected a value, got none"),
        (["--output", "o", "--lengths", "none"], "--lengths: expected integers"),
        (["--output", "o", "--keep", "1.5"], "keep: expected a number in (0, 1)"),
        (["--output", "o", "--lengths", "99999"], "documents: expected at least one of 99999"),
        (["--output", "o", "--lengths", "99,16"], "lengths: expected windows of at least 3 blocks"),
        (["--output", "o", "--documents", "absent.jsonl"], "absent.jsonl"),
        (["--output", "o", "--model", "absent/model"], "absent/model"),
        (["--output", "o", "--dense-layers", "a"], "--dense-layers: expected integers"),
        (["--output", "o", "--lengths", "64", "--dense-layers", "7"], "dense_layers: expected"),
        (["--output", "o", "--set", "step=3"], "unknown setting 'step'"),
        (["--output", "o", "--set", "search_windows=2.5"], "search_windows: expected an integer"),
        (["--output", "o", "--device", "gpu"], "device: expected one of auto, cpu, cuda"),
        (["--output", "o", "--device", "cuda"], "device: expected 'auto' or 'cpu'"),
        (["--output", "o", "--rope-scaling", "odd"], "rope_scaling: expected one of"),
    ],
)
def test_command_says_what_is_wrong(sources, tmp_path, monkeypatch, capsys, extra, message):
    monkeypatch.chdir(tmp_path)
    arguments = command(sources, *extra)
    assert run(arguments) != 0
    error = capsys.readouterr().err
    assert "error: " in error
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
