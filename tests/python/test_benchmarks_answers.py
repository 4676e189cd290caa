"""The benchmark of answers to long prompts, with a tiny model on the CPU."""

import json
import re
from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy

import answers
from answer_cases import ASKED, FACTS, TOKENIZER, TOKENS, documents, text
from answer_runs import Method, Trial
from answer_tasks import TRAINED, Mixture, make_haystacks
from answer_tasks.book import ANSWER_TOKENS
from answer_tasks.paraphrases import HELD_OUT_PAIRS, TRAIN_PAIRS
from lemo.data import Document
from lemo.predictors.model import model_shape
from lemo.relevance.heads import RetrievalHeads
from lemo.training.model import load_config, load_model
from tiny import save_tiny_llama

pytestmark = pytest.mark.cpu_only

QUESTION = re.compile(r"\nQuestion: (.*)\nAnswer: (.*)\n")


def mixture(*tasks, seed=0, **more):
    haystacks = make_haystacks(documents(), TOKENIZER, 20_000)
    return Mixture(tasks, haystacks, TOKENIZER, seed, FACTS, ASKED, **more)


def decoded(ids):
    return TOKENIZER.decode(ids)


def asked(window):
    """[(question, answer)] as a reader finds them."""
    return QUESTION.findall(decoded(window.ids))


def windows_of(task, count=4, **more):
    made = mixture(task, **more)
    return [made.window(i, TOKENS) for i in range(count)]


# --- windows


@pytest.mark.parametrize("task", TRAINED)
def test_a_window_has_its_length_and_labels_on_its_answers_alone(task):
    for window in windows_of(task):
        assert window.task == task
        assert window.ids.shape == window.labels.shape == (TOKENS,)
        labelled = torch.zeros(TOKENS, dtype=torch.bool)
        for answer in window.answers:
            labelled[answer.start : answer.end] = True
        assert torch.equal(window.labels != -100, labelled)
        assert torch.equal(window.labels[labelled], window.ids[labelled])
        if task in ("book", "text"):
            continue
        found = [decoded(window.labels[answer.start : answer.end]) for answer in window.answers]
        assert found == [f" {answer}\n" for _, answer in asked(window)]
        assert len(found) >= 1


@pytest.mark.parametrize("task", TRAINED)
def test_a_window_depends_on_seed_and_number_alone(task):
    first, again, other = (mixture(task, seed=seed) for seed in (3, 3, 4))
    second = first.window(1, TOKENS)
    assert torch.equal(again.window(1, TOKENS).ids, second.ids)
    assert again.window(1, TOKENS).answers == second.answers
    assert not torch.equal(other.window(1, TOKENS).ids, second.ids)
    assert not torch.equal(first.window(0, TOKENS).ids, second.ids)


def test_tasks_take_turns():
    made = mixture("number", "hops")
    assert [made.window(i, TOKENS).task for i in range(4)] == ["number", "hops"] * 2


def needed_texts(window):
    return [[decoded(window.ids[s:e]) for s, e in answer.needed] for answer in window.answers]


FORMS = {
    "number": r"\d{6}",
    "name": r"[A-Z]\w+ [A-Z]\w+",
    "key": r"[0-9a-f]{8}(-[0-9a-f]{4}){2}",
    "paraphrase": r"\d{6}",
}


@pytest.mark.parametrize("task", FORMS)
def test_one_fact_says_the_answer(task):
    for window in windows_of(task):
        for (question, answer), needed, found in zip(
            asked(window), needed_texts(window), window.answers
        ):
            (fact,) = needed
            thing, value = re.fullmatch(r"\nThe \w+ of the ([\w -]+) is (.*)\.\n", fact).groups()
            assert value == answer
            assert re.fullmatch(FORMS[task], answer)
            assert found.depth == found.needed[0][0] / TOKENS
            if task != "paraphrase":
                assert f"of the {thing}?" in question


def test_paraphrases_share_no_word_and_are_held_out():
    assert len(TRAIN_PAIRS) + len(HELD_OUT_PAIRS) >= 60
    things = [thing for thing, _ in TRAIN_PAIRS + HELD_OUT_PAIRS]
    others = [other for _, other in TRAIN_PAIRS + HELD_OUT_PAIRS]
    assert len(set(things)) == len(set(others)) == len(things)
    for thing, other in TRAIN_PAIRS + HELD_OUT_PAIRS:
        assert not set(thing.split()) & set(re.findall(r"\w+", other))
    for held_out, pairs in ((False, TRAIN_PAIRS), (True, HELD_OUT_PAIRS)):
        for window in windows_of("paraphrase", held_out=held_out):
            for (question, _), needed in zip(asked(window), needed_texts(window)):
                (other,) = [o for t, o in pairs if f"of the {t} is" in needed[0]]
                assert f"the {other}" in question


def test_reworded_answers_are_copied_from_nowhere():
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for held_out, pairs in ((False, TRAIN_PAIRS), (True, HELD_OUT_PAIRS)):
        for window in windows_of("reworded", held_out=held_out):
            for (question, answer), needed in zip(asked(window), needed_texts(window)):
                ((fact,), number) = needed, re.fullmatch(r"\d{6}", answer)[0]
                thing, value = re.fullmatch(
                    r"\nThe code of the ([\w -]+) is ([\w ]+)\.\n", fact
                ).groups()
                assert f"the {dict(pairs)[thing]}" in question
                assert "".join(str(digits.index(word)) for word in value.split()) == number
                assert decoded(window.ids).count(number) == 1


@pytest.mark.parametrize("task", ["paraphrase", "reworded"])
def test_more_facts_than_pairs_are_decoys_of_the_same_form(task):
    haystacks = make_haystacks(documents(), TOKENIZER, 20_000)
    window = Mixture([task], haystacks, TOKENIZER, 0, 40, ASKED, held_out=True).window(0, 3000)
    things = re.findall(r"\nThe code of the ([\w -]+) is [\w ]+\.\n", decoded(window.ids))
    paired = {thing for thing, _ in HELD_OUT_PAIRS}
    assert len(things) == len({*things}) == 40
    assert sum(thing in paired for thing in things) == len(paired)
    # They are mixed, and what is needed is what is asked for.
    assert {thing in paired for thing in things[: len(paired)]} == {True, False}
    for (question, _), [fact] in zip(asked(window), needed_texts(window)):
        thing = re.search(r"of the ([\w -]+) is", fact)[1]
        assert f"the {dict(HELD_OUT_PAIRS)[thing]}" in question


def test_all_values_are_asked_for_in_the_order_of_the_text():
    for window in windows_of("values"):
        facts = re.findall(r"\nOne code of the ([\w ]+) is (\d+)\.\n", decoded(window.ids))
        for (question, answer), needed in zip(asked(window), needed_texts(window)):
            thing = re.search(r"codes of the ([\w ]+),", question)[1]
            assert answer.split(", ") == [value for owner, value in facts if owner == thing]
            assert len(needed) == 3


def test_one_question_asks_for_several_things():
    for window in windows_of("query"):
        facts = dict(re.findall(r"\nThe code of the ([\w ]+) is (\d+)\.\n", decoded(window.ids)))
        for (question, answer), needed in zip(asked(window), needed_texts(window)):
            things = re.findall(r"the (\w+ \w+)(?=,| and|\?)", question)
            assert answer.split(", ") == [facts[thing] for thing in things]
            assert len(needed) == len(things) == 3


def test_two_hops_lead_to_the_answer():
    for window in windows_of("hops"):
        whole = decoded(window.ids)
        owners = dict(re.findall(r"\nThe ([\w ]+) belongs to ([\w ]+)\.\n", whole))
        secrets = dict(re.findall(r"\nThe secret number of ([\w ]+) is (\d+)\.\n", whole))
        for (question, answer), needed in zip(asked(window), needed_texts(window)):
            thing = re.search(r"owner of the ([\w ]+)\?", question)[1]
            assert answer == secrets[owners[thing]]
            assert [f"The {thing} belongs" in needed[0], answer in needed[1]] == [True, True]


@pytest.mark.parametrize(("task", "expected"), [("tracking", {1, 2, 3}), ("chain", {5})])
def test_variables_lead_to_their_values(task, expected):
    lengths = set()
    for window in windows_of(task, 8):
        # Run as a program, in the order of the text.
        values, lines = {}, {}
        for match in re.finditer(r"\nVAR (\w+) = (?:VAR )?(\w+)\.\n", decoded(window.ids)):
            name, source = match.groups()
            values[name] = source if source.isdigit() else values[source]
            lines[name] = (match[0], source)
        for (question, answer), needed in zip(asked(window), needed_texts(window)):
            name = re.search(r"VAR (\w+)\?", question)[1]
            assert answer == values[name]
            chain = []
            while not name.isdigit():
                line, name = lines[name]
                chain.append(line)
            assert needed == chain[::-1]
            lengths.add(len(chain))
    assert lengths == expected


def test_the_most_frequent_entry():
    for window in windows_of("frequent"):
        entries = re.findall(r"\nAn entry of the (\w+) list is (\w+)\.\n", decoded(window.ids))
        for (question, answer), needed in zip(asked(window), needed_texts(window)):
            counts = Counter(word for name, word in entries if f"the {name} list" in question)
            (best, times), (_, next_times) = counts.most_common(2)
            assert (answer, len(needed)) == (best, times)
            assert times > next_times


def test_what_is_not_said_is_not_stated():
    stated = []
    for window in windows_of("absent"):
        facts = dict(re.findall(r"\nThe code of the ([\w ]+) is (\d+)\.\n", decoded(window.ids)))
        for (question, answer), found in zip(asked(window), window.answers):
            thing = re.search(r"of the ([\w ]+)\?", question)[1]
            assert answer == facts.get(thing, "not stated")
            stated.append(thing in facts)
            assert (found.depth is not None) == bool(found.needed) == (thing in facts)
    assert 0.3 < sum(stated) / len(stated) < 0.5


def test_a_sentence_of_the_text_goes_on():
    for window in windows_of("book"):
        assert len(window.answers) == ASKED
        for answer in window.answers:
            assert answer.end - answer.start == ANSWER_TOKENS
            ((first, last),) = answer.needed
            sentence = decoded(window.ids[first:last])
            going_on = decoded(window.ids[answer.start : answer.end])
            before = decoded(window.ids[: answer.start])
            quoted = re.search(r'go on after "([^"]*)"\?\nAnswer:$', before)[1]
            assert sentence == quoted + going_on
            context = decoded(window.ids[: window.answers[0].start]).split("\nQuestion:")[0]
            assert context.count(quoted) == 1
            assert sentence.strip()[0].isupper()
            assert decoded(window.ids[answer.end : answer.end + 1]) == "\n"


def test_sentences_that_occur_twice_are_not_asked_for():
    lines = [Document("0", "book", text(6, 0) + " "), Document("1", "book", text(6, 1) + " ")]
    often = [Document(each.id, each.kind, 60 * each.text) for each in lines]
    made = Mixture(["book"], make_haystacks(often, TOKENIZER, 9000), TOKENIZER, 0, FACTS, ASKED)
    with pytest.raises(ValueError, match="expected windows with 3 rare sentences"):
        made.window(0, TOKENS)


def test_windows_that_are_too_short_are_refused():
    with pytest.raises(ValueError, match="tokens: expected more than the .* of task 'number'"):
        mixture("number").window(0, 500)
    with pytest.raises(ValueError, match="expected one of at least .* tokens"):
        mixture("number").window(0, 50_000)
    with pytest.raises(ValueError, match=r"tasks: expected some of .* got \['riddle'\]"):
        mixture("riddle")


# --- what a run measures


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    save_tiny_llama(folder / "model", context=1024)
    for name in ("train", "eval"):
        lines = ({"id": each.id, "kind": each.kind, "text": each.text} for each in documents())
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def base(inputs):
    name = str(inputs / "model")
    return load_model(name, load_config(name), torch.float32)


SMALL = {"keep": 0.25, "block_size": 1 / 16}


def test_what_lemo_kept_is_read_window_by_window(inputs):
    trial = Trial(base(inputs), Method("x", {**SMALL, "scorer": "lexical"}), 2, 0, "cpu")
    two = windows_of("number", 2)
    trial.loss(trial.prepared(two))
    size, kept = trial.kept(two)()
    assert size == TOKENS // 16
    assert [len(blocks) for blocks in kept] == [4, 4]
    for made, blocks in zip(two, kept):
        assert {(answer.start - 1) // size for answer in made.answers} <= set(blocks)
        alone = Trial(base(inputs), trial.method, 2, 0, "cpu")
        alone.loss(alone.prepared([made]))
        assert alone.kept([made])() == (size, [blocks])


def test_the_oracle_keeps_what_answers_need(inputs):
    method = Method("x", {**SMALL, "scorer": "given"}, scores="needed")
    trial = Trial(base(inputs), method, 2, 0, "cpu")
    made = windows_of("number", 2)
    tensors = trial.prepared(made)
    for row, each in zip(tensors["scores"], made):
        needed = torch.zeros(TOKENS, dtype=torch.bool)
        for answer in each.answers:
            for start, end in answer.needed:
                needed[start:end] = True
        assert torch.equal(row == 1.0, needed)
        assert row[~needed].max() < 0.5
    trial.loss(tensors)
    size, kept = trial.kept(made)()
    labelled = len({(answer.start - 1) // size for answer in made[0].answers})
    for each, blocks in zip(made, kept):
        places = {start // size for answer in each.answers for start, _ in answer.needed}
        assert len(places & set(blocks)) >= min(len(places), 4 - labelled)


@pytest.mark.parametrize("weights", [False, True])
def test_chunks_see_what_a_masked_window_sees(inputs, weights):
    chunks = Method("x", chunks={**SMALL, "words": 0.5, "weights": weights})
    trial = Trial(base(inputs), chunks, 2, 0, "cpu")
    made = windows_of("number", 1)
    tensors = trial.prepared(made)
    size, (kept,) = trial.kept(made)()
    assert (len(kept), kept[-1]) == (4, 15)
    assert tensors["ids"].shape == (1, 4 * size)

    seen = torch.zeros(TOKENS, dtype=torch.bool)
    for block in kept:
        seen[block * size : (block + 1) * size] = True
    assert torch.equal(tensors["positions"][0], seen.nonzero()[:, 0])
    visible = (seen | torch.eye(TOKENS, dtype=torch.bool)).tril()
    mask = torch.zeros(1, 1, TOKENS, TOKENS)
    if weights:
        block = torch.arange(TOKENS) // size
        mask[..., tensors["positions"][0]] = tensors["bias"]
        assert set(tensors["bias"].exp().round().unique().tolist()) == {1, 13}
        mask.masked_fill_(block[:, None] == block, 0.0)
    mask.masked_fill_(~visible, torch.finfo().min)
    logits = trial.model(input_ids=made[0].ids[None], attention_mask=mask).logits[0]
    rows = (made[0].labels[1:] != -100) & seen[:-1]
    assert rows.sum() == (made[0].labels != -100).sum()
    expected = cross_entropy(logits[:-1][rows], made[0].labels[1:][rows])
    torch.testing.assert_close(trial.loss(tensors), expected)


def test_micro_batches_give_the_loss_of_the_whole_batch(inputs):
    plain = Method("x")
    trial = Trial(base(inputs), plain, 2, 0, "cpu")
    mixed = [mixture("number", "frequent").window(i, TOKENS) for i in range(2)]
    tensors = trial.prepared(mixed)
    labels = tensors["labels"]
    logits = trial.model(input_ids=tensors["ids"]).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(trial.loss(tensors), expected)
    count = [(row != -100).sum() for row in labels]
    parts = [trial.loss(trial.prepared([each])) * n for each, n in zip(mixed, count)]
    torch.testing.assert_close(sum(parts) / sum(count), expected)


# --- whole runs


METHODS = """
dense: {elimination: {keep: 1.0}}
lexical: {elimination: {keep: 0.25, block_size: context/16, scorer: lexical}}
chunks: {chunks: {keep: 0.25, block_size: 0.0625}}
before: {steps: 0}
"""

ROW = {
    *("bench", "model", "task", "tokens", "method", "scorer", "keep", "seed", "steps", "equal"),
    *("exact", "step_s", "scoring_s", "peak_gib", "recall", "gpu", "torch", "commit", "date"),
}


def arguments(inputs, *more):
    (inputs / "methods.yaml").write_text(METHODS)
    return [
        *("--model", f"{inputs / 'model'}", "--train", f"{inputs / 'train.jsonl'}"),
        *("--eval", f"{inputs / 'eval.jsonl'}", "--file", f"{inputs / 'methods.yaml'}"),
        *("--tokens", f"{TOKENS}", "--steps", "2", "--batch", "2", "--warmup", "1"),
        *("--facts", f"{FACTS}", "--asked", f"{ASKED}", "--rank", "2", "--workers", "0"),
        *("--eval-windows", "2", "--guard-windows", "1", "--device", "cpu"),
        *("--cache", f"{inputs / 'cache'}", "--output", f"{inputs / 'rows.jsonl'}", *more),
    ]


def read_rows(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    return rows


def test_a_whole_run(inputs, capsys):
    run = arguments(inputs, "--tasks", "number", "absent", "--micro-batch", "1")
    assert answers.main(run) == 0
    rows = read_rows(inputs / "rows.jsonl")
    names = ["dense", "lexical", "chunks", "before"]
    assert [(row["method"], row["task"]) for row in rows] == [
        (name, task) for name in names for task in ("number", "absent", "mean")
    ]
    for row in rows:
        assert set(row) >= ROW
        assert (row["tokens"], row["equal"], row["peak_gib"]) == (TOKENS, "steps", None)
        assert 0 <= row["exact"] <= 100
    means = {row["method"]: row for row in rows if row["task"] == "mean"}
    assert means["dense"]["recall"] == 100.0
    assert means["before"]["recall"] is means["before"]["step_s"] is None
    assert means["lexical"]["kept_share"] == means["chunks"]["kept_share"] == 0.25
    assert [means[name]["scorer"] for name in names] == [None, "lexical", "random", None]
    assert [means[name]["steps"] for name in names] == [2, 2, 2, 0]
    assert 0 < means["lexical"]["recall"] < 100
    assert len({str(means[name]["perplexity"]) for name in names}) == 4
    assert set(means["dense"]["perplexity"]) == {str(TOKENS)}
    assert "dense keep 1, rate 0.0005, mean: exact" in capsys.readouterr().out


def test_methods_run_at_several_learning_rates_on_a_shared_card(inputs):
    run = arguments(inputs, "--tasks", "number", "--method", "lexical", "before", "--shared")
    assert answers.main([*run, "--learning-rate", "1e-3", "3e-2"]) == 0
    rows = [row for row in read_rows(inputs / "rows.jsonl") if row["task"] == "mean"]
    found = [(row["method"], row["shape"]["learning_rate"]) for row in rows]
    assert found == [("lexical", 1e-3), ("lexical", 3e-2), ("before", 5e-4)]
    assert rows[0]["perplexity"] != rows[1]["perplexity"]
    for row in rows:
        assert row["shared"]
        assert row["step_s"] is None
        assert not {"step_s_range", "training_s"} & {*row}
    own = METHODS.replace(
        "{elimination: {keep: 0.25", "{learning_rate: 0.02, elimination: {keep: 0.25"
    )
    (inputs / "own.yaml").write_text(own)
    run[run.index("--file") + 1] = str(inputs / "own.yaml")
    [method, _] = answers.parse_arguments(run).methods
    assert answers.rates_of(method, answers.parse_arguments(run)) == [0.02]


def test_text_is_trained_on_and_asked_nothing(inputs):
    run = arguments(inputs, "--tasks", "number", "text", "--method", "lexical")
    assert answers.main(run) == 0
    rows = read_rows(inputs / "rows.jsonl")
    assert [row["task"] for row in rows] == ["number", "mean"]
    assert rows[-1]["tasks"] == ["number", "text"]


def test_equal_time_growing_windows_and_a_curve(inputs):
    run = arguments(inputs, "--tasks", "number", "--method", "lexical", "--guard-windows", "0")
    assert answers.main([*run, "--minutes", "0.002", "--seed", "0", "1"]) == 0
    rows = read_rows(inputs / "rows.jsonl")
    assert [row["seed"] for row in rows] == [0, 0, 1, 1]
    for row in rows[1::2]:
        assert (row["equal"], row["minutes"]) == ("time", 0.002)
        # The first three steps are not part of the time.
        assert row["steps"] > 3
    assert answers.main([*run, "--grow", "1200", "--steps", "4", "--evaluate-every", "2"]) == 0
    row = read_rows(inputs / "rows.jsonl")[-1]
    assert (row["steps"], row["grow"]) == (4, [1200])
    assert [step for step, _ in row["curve"]] == [2, 4]


def test_relevance_without_training(inputs):
    run = arguments(inputs, "--tasks", "number", "frequent", "--keeps", "0.5", "1.0")
    assert answers.main([*run, "--relevance", "random", "lexical"]) == 0
    rows = read_rows(inputs / "rows.jsonl")
    assert [(row["scorer"], row["keep"], row["task"]) for row in rows] == [
        (scorer, keep, task)
        for scorer in ("random", "lexical")
        for keep in (0.5, 1.0)
        for task in ("number", "frequent", "mean")
    ]
    for row in rows:
        assert {"bench", "model", "task", "scorer", "keep", "recall", "scoring_s"} <= set(row)
        assert row["keep"] == 0.5 or row["recall"] == 100.0
    recall = {(row["scorer"], row["keep"]): row["recall"] for row in rows if row["task"] == "mean"}
    assert recall["lexical", 0.5] > recall["random", 0.5]


def test_relevance_by_retrieval_heads(inputs):
    shape = model_shape(load_config(str(inputs / "model")))
    RetrievalHeads(shape, ((0, 1),)).save(inputs / "heads.json")
    run = arguments(inputs, "--tasks", "number", "--keeps", "0.5", "--relevance", "attention")
    assert answers.main([*run, "--heads", f"{inputs / 'heads.json'}"]) == 0
    rows = read_rows(inputs / "rows.jsonl")
    assert {row["scorer"] for row in rows} == {"attention"}


def test_haystacks_come_back_from_the_cache(inputs):
    from answer_tasks import load_haystacks

    path, cache = inputs / "train.jsonl", inputs / "other"
    made, again = (load_haystacks(path, TOKENIZER, 5000, cache) for _ in range(2))
    assert len(list(cache.iterdir())) == 1
    for first, second in zip(made.documents, again.documents, strict=True):
        for name in ("ids", "sentences", "rarity"):
            assert (getattr(first, name) == getattr(second, name)).all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "best"], "--method: expected names of"),
        (["--relevance", "best"], "--relevance: expected names of"),
        (["--relevance", "before"], "--relevance: 'before' scores no blocks"),
        (["--tasks", "riddle"], "invalid choice: 'riddle'"),
        (["--tasks", "text"], "--eval-tasks: expected tasks that ask for something"),
        (["--minutes", "1", "--grow", "512"], "--grow: expected --steps"),
        (["--recompute", "some"], "recompute"),
        (["--relevance", "attention"], "--heads: expected a path, because 'attention'"),
    ],
)
def test_bad_arguments(inputs, capsys, more, message):
    with pytest.raises(SystemExit):
        answers.parse_arguments(arguments(inputs, *more))
    assert message in capsys.readouterr().err


def test_the_methods_of_the_repository_are_valid(inputs):
    more = ["--file", "benchmarks/answers.yaml", "--heads", "heads", "--predictor", "folder"]
    options = answers.parse_arguments(arguments(inputs, *more))
    methods = {method.name: method for method in options.methods}
    assert methods["random-0.25"].elimination["scorer"] == "random"
    assert methods["s2"].elimination["layerwise"] == {"group_size": TOKENS // 4}
    assert methods["attention-0.25"].elimination["heads"] == "heads"
    assert (methods["oracle-0.25"].scorer, methods["oracle-0.25"].keep) == ("needed", 0.25)


def test_a_method_names_its_scorer(inputs, tmp_path, capsys):
    (file := tmp_path / "methods.yaml").write_text("chance: {elimination: {keep: 0.25}}")
    with pytest.raises(SystemExit):
        answers.parse_arguments(arguments(inputs, "--method", "chance", "--file", str(file)))
    assert "chance: expected elimination with a scorer, got none" in capsys.readouterr().err
