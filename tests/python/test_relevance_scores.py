"""lemo relevance, and runs that keep blocks by stored scores."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from lemo import LemoConfig
from lemo.cli.main import main
from lemo.data import collate, open_training_data
from lemo.predictors.model import model_shape
from lemo.relevance import store
from lemo.relevance.heads import RetrievalHeads
from lemo.relevance.store import ScoreStore, write_scores
from lemo.settings.finetune import FinetuneConfig
from lemo.settings.relevance import ScoresConfig
from lemo.training.finetune import finetune
from lemo.training.model import load_config, load_tokenizer
from lemo.training.run_log import read_log
from tiny import sample_text, save_tiny_llama, write_documents

# Compared in fp32, which a GPU's attention does not know.
pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("script_defaults")]

CONTEXT, BLOCK = 320, 16


def write_pairs(path, prompt_lengths):
    """Prompts of so many characters, the answer of each of which stands somewhere in it."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number, length in enumerate(prompt_lengths):
            text = sample_text(80, number)[:length]
            answer = f"{draw.randrange(10**7, 10**8)}"
            at = draw.randrange(length - 40)
            prompt = f"{text[:at]} {answer} {text[at + 10 :]}?"
            file.write(json.dumps({"prompt": prompt, "completion": f" {answer}"}) + "\n")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_llama(folder / "model", context=CONTEXT)
    draw = random.Random(0)
    write_pairs(folder / "packed.jsonl", [draw.randrange(60, 200) for _ in range(12)])
    write_pairs(folder / "whole.jsonl", [260] * 6)
    write_documents(folder / "documents.jsonl")
    shape = model_shape(load_config(str(folder / "model")))
    RetrievalHeads(shape, ((0, 1), (1, 2))).save(folder / "heads.json")
    return folder


@pytest.fixture
def lemo(capsys, inputs, tmp_path, monkeypatch):
    """Runs a command line; {model} and the names of the inputs stand for their paths."""
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str, str]:
        names = {path.stem: path for path in inputs.iterdir()}
        with pytest.raises(SystemExit) as exit_:
            main(line.format(**names).split())
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run


SCORES = (
    f"relevance scores --model {{model}} --output scores --context-length {CONTEXT} "
    f"--block-size {BLOCK} "
)
TRAIN = (
    f"finetune --model {{model}} --context-length {CONTEXT} --keep 0.4 --lora-rank 4 --steps 4 "
    f"--batch-size 2 --set elimination.block_size={BLOCK} --set warmup_steps=0 "
)


def kept(folder):
    records = read_log(Path(folder) / "log.jsonl")
    return [(record["loss"], record["kept"]) for record in records]


@pytest.mark.parametrize("data", ["packed", "whole"])
def test_stored_scores_keep_what_the_scorer_keeps(lemo, inputs, data):
    code, out, err = lemo(SCORES + f"--documents {{{data}}}")
    assert (code, out) == (0, "")
    assert err.splitlines()[-1].startswith("scores of ")
    tokenizer = load_tokenizer(str(inputs / "model"))
    windows = open_training_data(inputs / f"{data}.jsonl", tokenizer, CONTEXT)
    assert windows.packed == (data == "packed")
    documents = f"--documents {{{data}}} "
    assert lemo(TRAIN + documents + "--output stored --scores scores")[0] == 0
    for scorer in ("lexical", "random"):
        chosen = f"--output {scorer} --set elimination.scorer={scorer}"
        assert lemo(TRAIN + documents + chosen)[0] == 0
    assert kept("stored") == kept("lexical")
    assert kept("stored") != kept("random")
    stored, lexical = (Path(f"{name}/kept_map.json").read_text() for name in ("stored", "lexical"))
    assert stored == lexical


def test_scores_by_attention_are_those_of_the_first_step(lemo, inputs):
    line = SCORES + "--documents {packed} --scorer attention --heads {heads}"
    assert lemo(line)[0] == 0
    train = TRAIN + "--documents {packed} --steps 1 --keep 0.7 "
    assert lemo(train + "--output stored --scores scores")[0] == 0
    assert lemo(train + "--output heads --heads {heads}")[0] == 0
    assert lemo(train + "--output lexical --set elimination.scorer=lexical")[0] == 0
    maps = [json.loads(Path(f"{n}/kept_map.json").read_text()) for n in ("stored", "heads")]
    assert maps[0] == maps[1]
    assert kept("stored") == kept("heads")
    # The heads of random weights say something else than the words.
    assert kept("stored") != kept("lexical")
    # A scout with the weights of the model gives the same.
    scores = ScoreStore.read("scores")
    line = line.replace("scores --model {model}", "scores --model {model} --scout {model}")
    assert lemo(line.replace("--output scores", "--output by_scout"))[0] == 0
    assert ScoreStore.read("by_scout").digest == scores.digest
    assert scores.about["dtype"] == "float32"


def test_a_scout_has_the_tokenizer_of_the_model(lemo, inputs, tmp_path):
    scout = save_tiny_llama(tmp_path / "scout", layers=1, context=CONTEXT)
    heads = RetrievalHeads(model_shape(load_config(str(scout))), ((0, 1),))
    heads.save(tmp_path / "scout.json")
    line = SCORES + f"--documents {{whole}} --scorer attention --scout {scout} --heads "
    assert lemo(line + f"{tmp_path / 'scout.json'}")[0] == 0
    code, _, err = lemo(line + "{heads} --overwrite")
    assert code == 1
    assert "expected heads of a model of this shape" in err
    file = scout / "tokenizer.json"
    changed = json.loads(file.read_text())
    changed["pre_tokenizer"]["add_prefix_space"] = True
    file.write_text(json.dumps(changed))
    code, _, err = lemo(line + f"{tmp_path / 'scout.json'} --overwrite")
    assert code == 1
    assert "scout: expected a model with the tokenizer of the model that is trained" in err


def test_what_decides_scores_by_attention_is_compared(lemo, inputs, tmp_path):
    line = SCORES + "--documents {whole} --scorer attention --heads "
    assert lemo(line + "{heads}")[0] == 0
    RetrievalHeads(model_shape(load_config(str(inputs / "model"))), ((1, 0),)).save("other.json")
    shutil.copytree(inputs / "model", "changed")
    weights = load_file("changed/model.safetensors")
    weights["model.norm.weight"] += 1.0
    save_file(weights, "changed/model.safetensors", {"format": "pt"})

    def refused(more, message):
        code, _, err = lemo(line + more + " --resume")
        assert (code, f"resume: 'scores' was made with other settings: {message}" in err) == (
            1,
            True,
        )

    refused("other.json", "heads is another one")
    refused("{heads} --scout changed", "scorer's weights is another one")
    refused("{heads} --rope-scaling yarn", "rope_scaling was 'linear', now 'yarn'")


def test_a_scout_reads_all_tokens_of_the_documents(lemo, inputs, tmp_path):
    """As long as they are, but for those behind the end of its embedding."""
    line = SCORES + "--documents {whole} --scorer attention --heads heads.json --scout scout "

    def scout(**changes):
        save_tiny_llama(tmp_path / "scout", context=CONTEXT)
        config = load_config("scout")
        for name, value in changes.items():
            setattr(config, name, value)
        LlamaForCausalLM(config).save_pretrained("scout")
        RetrievalHeads(model_shape(config), ((0, 1),)).save("heads.json")

    scout(vocab_size=90)
    code, _, err = lemo(line)
    assert code == 1
    assert "tokenizer: expected ids below 90, the rows of the model's embedding" in err
    scout(max_position_embeddings=64)
    assert lemo(line)[0] == 0
    scores = ScoreStore.read("scores")
    assert lemo(line + "--rope-scaling none --overwrite")[0] == 0
    assert ScoreStore.read("scores").digest != scores.digest


def test_examples_without_answers_have_no_scores(lemo, inputs, tmp_path):
    with Path("pairs.jsonl").open("w") as file:
        file.write((inputs / "whole.jsonl").read_text().splitlines()[0] + "\n")
        file.write(json.dumps({"prompt": "what?", "completion": " all that is said here"}) + "\n")
    for scorer in ("lexical", "attention --heads {heads}"):
        line = SCORES + f"--documents pairs.jsonl --overwrite --scorer {scorer}"
        code, _, err = lemo(line)
        assert code == 0
        assert "warning: documents: 1 of 2 examples have labels on more than half" in err
        tokenizer = load_tokenizer(str(inputs / "model"))
        first, last = open_training_data("pairs.jsonl", tokenizer, CONTEXT).examples
        scores = ScoreStore.read("scores")
        assert scores.of(first).sum() > 0
        assert scores.of(last) is None


def test_scores_are_gone_on_with(lemo, inputs, monkeypatch):
    monkeypatch.setattr(store, "_FILE_TOKENS", 300)
    line = SCORES + "--documents {packed}"
    assert lemo(line)[0] == 0
    whole = {path.name: path.read_bytes() for path in Path("scores").iterdir()}
    assert len(whole) > 4
    Path("scores/scores-00003.safetensors").unlink()
    code, _, err = lemo(line)
    assert (code, err.count("\n")) == (1, 1)
    assert "--resume goes on with scores that are there" in err
    code, _, err = lemo(TRAIN + "--documents {packed} --output run --scores scores")
    assert code == 1
    assert "lacks scores-00003.safetensors" in err
    assert not Path("run").exists()
    code, _, err = lemo(line + " --resume --set block_size=32")
    assert code == 1
    assert "resume: 'scores' was made with other settings: block_size was 16, now 32" in err
    code, _, err = lemo(line.replace("packed", "whole") + " --resume")
    assert "the examples are others now" in err
    assert lemo(line + " --resume")[0] == 0
    assert {path.name: path.read_bytes() for path in Path("scores").iterdir()} == whole


def test_an_interruption_says_how_to_go_on(lemo, monkeypatch):
    monkeypatch.setattr(store, "_FILE_TOKENS", 300)
    content = store._content

    def stop(examples, *rest):
        if examples[0].name.endswith(":1"):
            return content(examples, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_content", stop)
    code, _, err = lemo(SCORES + "--documents {packed}")
    assert code == 130
    assert "what is scored is kept; to go on, give the same command with --resume\n" in err
    code, _, err = lemo(SCORES + "--documents {packed} --overwrite")
    assert (code, "--resume in place of --overwrite\n" in err) == (130, True)


def test_scores_of_something_else_are_refused_before_training(lemo, inputs):
    assert lemo(SCORES + "--documents {packed}")[0] == 0

    def refused(line, *messages):
        code, _, err = lemo(TRAIN + "--output run --scores scores " + line)
        assert (code, err.count("lemo: error:")) == (1, 1)
        for message in messages:
            assert message in err
        assert not Path("run").exists()

    refused("--documents {whole}", "has none of 6 of 6, such as", "the data or the chat template")
    refused("--documents {packed} --context-length 150", "context_length was 320, now 150")
    refused("--documents {packed} --set labels=all", "labels was 'answers', now 'all'")
    refused("--documents {documents}", "scores: expected conversations", "holds texts")
    refused("--documents {packed} --heads {heads}", "--heads and --scores: expected one of them")
    refused("--documents {packed} --set elimination.scorer=random", "expected scorer 'given'")
    code, _, err = lemo(TRAIN + "--documents {packed} --output run --scores nowhere")
    assert (code, "nowhere/scores.json does not exist" in err) == (1, True)
    code, _, err = lemo(TRAIN + "--documents {packed} --output run --set elimination.scorer=given")
    assert (code, "scorer 'given' needs the folder" in err) == (1, True)


def test_blocks_shorter_than_the_stored_ones_are_warned_of(lemo):
    assert lemo(SCORES + "--documents {packed} --set block_size=32")[0] == 0
    train = TRAIN + "--documents {packed} --steps 1 --scores scores --overwrite --output run "
    code, _, err = lemo(train)
    assert code == 0
    assert "blocks of 16 tokens are shorter than the 32 that the stored" in err
    code, _, err = lemo(train + "--set elimination.block_size=32")
    assert (code, "shorter than" in err) == (0, False)


def test_texts_have_no_scores(lemo):
    code, _, err = lemo(SCORES + "--documents {documents}")
    assert (code, err.count("\n")) == (1, 1)
    assert "documents: expected conversations, or prompts with completions" in err
    assert not Path("scores").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume": True, "overwrite": True}, "at most one of the two"),
        ({"scorer": "attention"}, "heads: scorer 'attention' needs the file"),
        ({"scout": "m"}, "scout: expected null beside scorer 'lexical'"),
        ({"heads": "h"}, "heads: expected null beside scorer 'lexical'"),
        ({"scorer": "exact"}, "scorer: expected one of lexical, attention, got 'exact'"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        ScoresConfig(**{"model": "m", "documents": "d", "output": "o"} | changes)


def config(inputs, output, **settings):
    return FinetuneConfig(
        model=str(inputs / "model"),
        documents=str(inputs / "packed.jsonl"),
        output=str(output),
        context_length=CONTEXT,
        elimination=LemoConfig(
            scorer="given", scores=str(output.parent / "scores"), block_size=BLOCK, keep=0.4
        ),
        **{"steps": 4, "save_every": 2, "lora_rank": 4, "warmup_steps": 0} | settings,
    )


def own_scores(inputs, folder, best, **more):
    """Scores of a user: the token `best` of each example is all that counts."""
    tokenizer = load_tokenizer(str(inputs / "model"))
    windows = open_training_data(inputs / "packed.jsonl", tokenizer, CONTEXT)

    def score(example):
        scores = torch.zeros(len(example.ids))
        scores[best] = 1.0
        return scores

    write_scores(folder, windows.examples, score, block_size=1, **more)


def test_scores_of_a_user_decide_and_are_compared_when_a_run_goes_on(inputs, tmp_path):
    own_scores(inputs, tmp_path / "scores", best=20)
    run = config(inputs, tmp_path / "run")
    whole = run.replace(output=str(tmp_path / "whole"))
    finetune(whole)

    class StopError(Exception):
        pass

    def stop(record):
        if record["step"] == 3:
            raise StopError

    with pytest.raises(StopError):
        finetune(run, stop)
    # What lies there is compared, not where.
    (tmp_path / "scores").rename(tmp_path / "moved")
    moved = run.replace(
        resume=True, elimination=run.elimination.replace(scores=str(tmp_path / "moved"))
    )
    with pytest.raises(FileNotFoundError, match=r"elimination\.scores: .* say with --scores where"):
        finetune(run.replace(resume=True))
    finetune(moved)
    assert kept(tmp_path / "run") == kept(tmp_path / "whole")
    own_scores(inputs, tmp_path / "moved", best=40, overwrite=True)
    with pytest.raises(StopError):
        finetune(run.replace(output=str(tmp_path / "b"), elimination=moved.elimination), stop)
    own_scores(inputs, tmp_path / "moved", best=20, overwrite=True)
    with pytest.raises(ValueError, match="changed since: scores; put back"):
        finetune(moved.replace(output=str(tmp_path / "b")))


def test_heads_are_compared_when_a_run_goes_on(inputs, tmp_path):
    heads = RetrievalHeads.load(
        inputs / "heads.json", model_shape(load_config(str(inputs / "model")))
    )
    heads.save(tmp_path / "heads.json")
    by_heads = LemoConfig(scorer="attention", heads=str(tmp_path / "heads.json"), block_size=BLOCK)
    run = config(inputs, tmp_path / "run").replace(elimination=by_heads)

    class StopError(Exception):
        pass

    def stop(record):
        if record["step"] == 3:
            raise StopError

    with pytest.raises(StopError):
        finetune(run, stop)
    RetrievalHeads(heads.model, ((1, 0),)).save(tmp_path / "heads.json")
    with pytest.raises(ValueError, match="changed since: heads; put back"):
        finetune(run.replace(resume=True))
    heads.save(tmp_path / "heads.json")
    finetune(run.replace(resume=True))


def test_tokens_of_a_packed_window_have_the_scores_of_their_blocks(inputs, tmp_path):
    tokenizer = load_tokenizer(str(inputs / "model"))
    path = inputs / "packed.jsonl"
    examples = open_training_data(path, tokenizer, CONTEXT).examples

    def score(example):
        blocks = -(-len(example.ids) // BLOCK)
        return None if example is examples[0] else torch.arange(blocks) + sum(example.ids) / 1e6

    write_scores(tmp_path / "s", examples, score, block_size=BLOCK)
    windows = open_training_data(path, tokenizer, CONTEXT, scores=ScoreStore.read(tmp_path / "s"))
    drawn = []
    for index in range(2 * len(windows)):
        window = windows.window(index)
        assert window.scores.shape == window.ids.shape
        parts = (tensor.split(list(window.seqlens)) for tensor in (window.ids, window.scores))
        for ids, scores in zip(*parts, strict=True):
            if ids.tolist() == list(examples[0].ids):
                drawn.append(scores)
                assert len(scores.unique()) == -(-len(ids) // BLOCK)
                continue
            for place, found in enumerate(scores.tolist()):
                expected = place // BLOCK + sum(ids.tolist()) / 1e6
                assert found == pytest.approx(expected, rel=1e-6)
    # Without scores blocks are drawn anew in every epoch, and alike in every run.
    assert not torch.equal(*drawn)
    again = open_training_data(path, tokenizer, CONTEXT, scores=ScoreStore.read(tmp_path / "s"))
    for index in range(2 * len(windows)):
        assert torch.equal(again.window(index).scores, windows.window(index).scores)
    batch = collate([windows.window(0), windows.window(1)])
    assert batch.scores.shape == batch.input_ids.shape
    assert torch.equal(
        batch.scores[0], torch.cat([windows.window(index).scores for index in (0, 1)])
    )
    assert "scores" not in batch.arguments()


def test_heads_are_found_and_used(lemo, inputs, tmp_path):
    save_tiny_llama(tmp_path / "long", context=1024)
    write_documents(tmp_path / "books.jsonl", count=2, words=1400)
    line = (
        f"relevance heads --model {tmp_path / 'long'} --documents {tmp_path / 'books.jsonl'} "
        "--context-length 2048 --windows 2 --output found.json --count 3 --layers 2"
    )
    code, out, err = lemo(line)
    assert code == 0, err
    assert err.splitlines()[-1] == "windows: 2 of 2"
    assert "share of a head's looks" in out.replace("\n", " ")
    assert out.splitlines()[-1] == "written: found.json"
    found = json.loads(Path("found.json").read_text())
    assert len(found["heads"]) == 3
    for layer, head in found["heads"]:
        share = found["found_by"]["share_of_looks"][f"{layer}.{head}"]
        assert f"{share:.3f}" in out
    code, _, err = lemo(line)
    assert (code, "found.json' exists already" in err) == (1, True)
    assert lemo(line + " --overwrite")[0] == 0
    code, _, err = lemo(line.replace("found.json", "nowhere/found.json"))
    assert (code, "--output: expected a file in a folder that exists" in err) == (1, True)
    line = SCORES + "--documents {whole} --scorer attention --heads found.json"
    code, _, err = lemo(line.replace("{model}", str(tmp_path / "long")))
    assert (code, "another model" in err) == (0, False)
    file = tmp_path / "long" / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][3] *= 1.01
    save_file(weights, file, metadata={"format": "pt"})
    code, _, err = lemo(line.replace("{model}", str(tmp_path / "long")) + " --overwrite")
    assert code == 0
    assert "heads: found.json: made for another model of this shape, or for this one bef" in err
