"""enable, the handle and their errors: what a training script sees."""

import copy
import inspect

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForMaskedLM, LlamaModel, Trainer, TrainingArguments

import lemo
from internals import run_decoder
from lemo.models.calls.arguments import ForwardArguments
from lemo.models.layers.architectures import architecture_of
from tiny_models import (
    ARCHITECTURES,
    HIDDEN,
    config_of,
    gradients,
    make_ids,
    make_model,
    packed_batch,
    padded_batch,
)
from tolerances import assert_close_fp32

HALF = config_of(keep=0.5, dense_layers=[], block_size=8)
EVERYTHING = config_of(keep=1.0, dense_layers=[], block_size=8)
BATCH = padded_batch([61, 40])

# The GPU's attention knows no fp32; test_models_low_precision.py compares models there.
fp32 = pytest.mark.cpu_only


def decoder_of(model):
    return model.model.decoder if model.config.model_type == "opt" else model.model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_remove_leaves_no_trace(architecture):
    model = make_model(architecture)
    decoder = decoder_of(model)
    before = [dict(vars(module)) for module in (model, decoder)]
    classes = [type(module).forward for module in (model, decoder)]
    expected = model(**BATCH).loss
    handle = lemo.enable(model, HALF)
    assert model(**BATCH).loss != expected
    assert [type(module).forward for module in (model, decoder)] == classes
    assert make_model(architecture)(**BATCH).loss == expected, "another instance has changed"
    handle.remove()
    assert [dict(vars(module)) for module in (model, decoder)] == before
    assert torch.equal(model(**BATCH).loss, expected)
    handle.remove()
    lemo.enable(model, HALF).remove()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_eval_mode_and_generation_are_dense(architecture):
    model, dense = make_model(architecture), make_model(architecture)
    handle = lemo.enable(model, HALF)
    for each in (model, dense):
        each.eval()
    outputs, expected = model(**BATCH), dense(**BATCH)
    assert torch.equal(outputs.loss, expected.loss)
    assert torch.equal(outputs.logits, expected.logits)
    prompt = {"input_ids": make_ids(2, 40)}
    for each in (model, dense):
        each.train()
    tokens = [each.generate(**prompt, max_new_tokens=4, do_sample=False) for each in (model, dense)]
    assert torch.equal(*tokens)
    assert handle.statistics() == []


@fp32
def test_the_decoder_alone_eliminates_too():
    model = make_model("llama")
    handle = lemo.enable(model, EVERYTHING)
    expected = make_model("llama").model(BATCH["input_ids"]).last_hidden_state
    assert_close_fp32(model.model(BATCH["input_ids"]).last_hidden_state, expected)
    assert isinstance(model.model(BATCH["input_ids"], return_dict=False), tuple)
    assert len(handle.statistics()) == 3


def test_statistics():
    model = make_model("llama")
    handle = lemo.enable(model, config_of(keep=0.75, keep_mlp=0.5, dense_layers=[0], block_size=8))
    assert handle.statistics() == []
    model(**BATCH)
    first, *others = handle.statistics()
    assert (first.layer, first.tokens, first.attention_rows, first.mlp_rows) == (0, 101, 101, 101)
    assert first.attention_blocks is None
    assert first.mlp_blocks is None
    for number, layer in enumerate(others, 1):
        # 8 blocks (the last of 5 tokens) and 5 blocks of 8.
        assert layer.layer == number
        assert layer.layout.seqlens == (61, 40)
        assert len(layer.attention_blocks) == 6 + 4
        assert layer.attention_rows == 5 * 8 + 5 + 4 * 8
        assert len(layer.mlp_blocks) == 4 + 3
        assert layer.mlp_rows == 3 * 8 + 5 + 3 * 8
        for blocks in (layer.attention_blocks, layer.mlp_blocks):
            assert {0, 7, 8, 12} <= set(blocks.tolist())


def test_schedule():
    model = make_model("llama")
    config = config_of(
        keep=0.5, dense_layers=[0], block_size=8, keep_schedule=[[0.5, 0.25], [0.9, 1]]
    )
    handle = lemo.enable(model, config)

    def kept_blocks(progress):
        handle.set_progress(progress)
        model(**BATCH)
        blocks = [layer.attention_blocks for layer in handle.statistics()]
        return [None if kept is None else len(kept) for kept in blocks]

    assert kept_blocks(0.0) == kept_blocks(0.49) == [None, 7, 7]
    assert kept_blocks(0.5) == [None, 4, 4]
    assert kept_blocks(0.9) == kept_blocks(1.0) == [None, None, None]
    assert kept_blocks(0.2) == [None, 7, 7]
    with pytest.raises(ValueError, match="progress: expected a share between 0 and 1, got 1.5"):
        handle.set_progress(1.5)


def test_random_scores_of_a_step_are_drawn_again():
    def losses(handle, model, count):
        return [model(**BATCH).loss.item() for _ in range(count)]

    config = config_of(keep=0.3, dense_layers=[], block_size=8, scorer="random", seed=3)
    model = make_model("llama")
    handle = lemo.enable(model, config)
    handle.begin_step(0, 4)
    first = losses(handle, model, 2)
    handle.begin_step(1, 4)
    second = losses(handle, model, 3)
    assert len({*first, *second}) > 1, "the draw is not fresh"
    resumed = make_model("llama")
    other = lemo.enable(resumed, config)
    other.begin_step(1, 4)
    assert losses(other, resumed, 3) == second


def test_a_deep_copy_is_a_model_of_its_own():
    model = make_model("llama")
    lemo.enable(model, HALF)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert twin(**BATCH).loss != model(**BATCH).loss
    twin(**BATCH).loss.backward()
    assert gradients(twin)
    assert not gradients(model)


# Loss


@fp32
def test_masked_tokens_have_no_loss():
    config = {"keep": 0.5, "dense_layers": [], "block_size": 8}
    losses = {}
    for mask in (True, False):
        model = make_model("llama")
        handle = lemo.enable(model, config_of(**config, mask_loss=mask))
        losses[mask] = model(**BATCH).loss
        statistics = handle.statistics()
        # Logits that a user asks for are the dense model's, so inside:
        batch, residual, _ = run_decoder(handle, BATCH)
        logits = model.lm_head(batch.packed.unpack(model.model.norm(residual)))
    kept = torch.zeros(101, dtype=torch.bool)
    for layer in statistics:
        starts = layer.layout.block_starts.tolist()
        for block in layer.attention_blocks.tolist():
            kept[starts[block] : starts[block + 1]] = True
    assert not kept.all()
    present = BATCH["attention_mask"].bool()
    counted = torch.zeros_like(present)
    counted[present] = kept
    targets = torch.full_like(BATCH["labels"], -100)
    targets[:, :-1] = BATCH["labels"][:, 1:]
    assert_close_fp32(losses[False], cross_entropy(logits.flatten(0, 1), targets.flatten()))
    targets = targets.masked_fill(~counted, -100)
    assert_close_fp32(losses[True], cross_entropy(logits.flatten(0, 1), targets.flatten()))


@fp32
@pytest.mark.parametrize("items", [37, torch.tensor(37)])
def test_the_trainers_divisor(items):
    model, dense = make_model("llama"), make_model("llama")
    lemo.enable(model, EVERYTHING)
    batch = {**BATCH, "num_items_in_batch": items}
    assert_close_fp32(model(**batch).loss, dense(**batch).loss)


def test_the_trainers_divisor_shrinks_with_the_labels_that_are_masked():
    model = make_model("llama")
    lemo.enable(model, HALF)
    used = int((BATCH["labels"][:, 1:] != -100).sum())
    mean = model(**BATCH).loss
    assert_close_fp32(model(**BATCH, num_items_in_batch=used).loss, mean)
    assert_close_fp32(model(**BATCH, num_items_in_batch=4 * used).loss, mean / 4)


@fp32
def test_embeddings_in_any_memory_order():
    model, dense = make_model("llama"), make_model("llama")
    lemo.enable(model, EVERYTHING)
    embeddings = torch.randn(1, HIDDEN, 30).transpose(1, 2)
    batch = {"inputs_embeds": embeddings, "labels": make_ids(1, 30)}
    assert_close_fp32(model(**batch).loss, dense(**batch).loss)


@fp32
def test_labels_that_are_shifted_already():
    model, dense = make_model("llama"), make_model("llama")
    lemo.enable(model, EVERYTHING)
    ids = make_ids(2, 30)
    batch = {"input_ids": ids, "labels": ids, "shift_labels": make_ids(2, 30, seed=5)}
    assert_close_fp32(model(**batch).loss, dense(**batch).loss)


@fp32
def test_the_rows_that_predict_labels_are_kept_first():
    """Short answers: no label may be lost as long as the share allows it."""
    model, dense = make_model("llama"), make_model("llama")
    batch = padded_batch([64, 64])
    labels = torch.full_like(batch["labels"], -100)
    # Predicted by rows 8 to 10 and 31 of the first sequence, 15 of the second.
    for place in ((0, 9), (0, 10), (0, 11), (0, 32), (1, 16)):
        labels[place] = batch["labels"][place]
    settings = {"keep": 0.25, "dense_layers": [], "block_size": 8, "scorer": "random"}
    config = config_of(**settings, keep_first=0, keep_last=0, visible_keys="computed")
    handle = lemo.enable(model, config)
    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    for given in (
        {"labels": labels},
        {"labels": batch["labels"], "shift_labels": shifted},
        {"labels": labels.masked_fill(labels == -100, 7), "ignore_index": 7},
    ):
        loss = model(**batch | given).loss
        for layer in handle.statistics():
            *first, third, fourth = layer.attention_blocks.tolist()
            assert first == [1, 3]
            assert 8 + 1 in (third, fourth)
        # Every label counts, and every row sees all others: the dense model's loss.
        assert_close_fp32(loss, dense(**batch | given).loss, "loss")


def test_no_label_at_all_gives_zero_and_zero_gradients():
    model = make_model("llama")
    lemo.enable(model, EVERYTHING)
    loss = model(BATCH["input_ids"], labels=torch.full_like(BATCH["labels"], -100)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("shifted", [False, True])
def test_padding_that_has_labels_is_refused(shifted):
    """The model's own loss counts it, over tokens that see nothing."""
    model = make_model("llama")
    lemo.enable(model, EVERYTHING)
    mask, labels = BATCH["attention_mask"] == 0, BATCH["labels"].clone()
    labels[mask] = 7
    batch = {**BATCH, "labels": labels}
    if shifted:
        # Its last token predicts one, too.
        batch["shift_labels"] = torch.cat([labels[:, 1:], labels[:, -1:]], 1)
    name, count = ("shift_labels", 21) if shifted else ("labels", 20)
    # The first token of the padding is predicted by the last that is none, and may have a label.
    message = f"^{name}: expected -100 on padding .* got {count} labels"
    with pytest.raises(ValueError, match=message):
        model(**batch)


@fp32
def test_a_first_token_behind_padding_does_not_count():
    """Padding on the left predicts it, and has no loss; the divisor shrinks with it."""
    batch = padded_batch([61, 40], side="left")
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), torch.tensor(-100))
    model = make_model("llama")
    lemo.enable(model, EVERYTHING)
    mean = model(**batch).loss
    used = int((batch["labels"][:, 1:] != -100).sum())
    assert_close_fp32(model(**batch, num_items_in_batch=used).loss, mean)


@fp32
def test_tuple_outputs_and_logits_to_keep():
    model, dense = make_model("llama"), make_model("llama")
    lemo.enable(model, EVERYTHING)
    outputs = model(**BATCH, return_dict=False)
    assert len(outputs) == 2
    for mine, expected in zip(outputs, dense(**BATCH, return_dict=False)):
        present = BATCH["attention_mask"].bool() if mine.ndim else ...
        assert_close_fp32(mine[present], expected[present])
    ids = BATCH["input_ids"]
    for keep in (3, torch.tensor([2, 5])):
        assert_close_fp32(
            model(ids, logits_to_keep=keep).logits, dense(ids, logits_to_keep=keep).logits
        )


# Company: PEFT, Accelerate, Trainer


def test_dropout_of_lora_is_active_in_training_but_not_while_scoring():
    torch.manual_seed(0)
    settings = LoraConfig(
        r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False
    )
    model = get_peft_model(make_model("llama"), settings)
    handle = lemo.enable(model, config_of(keep=0.5, dense_layers=[0], block_size=8))
    assert len({model(**BATCH).loss.item() for _ in range(3)}) == 3
    drop = model.base_model.model.model.layers[1].self_attn.q_proj.lora_dropout["default"]
    assert drop.training
    state = torch.get_rng_state()
    scorer = handle._forward.elimination.scorer
    ids = ForwardArguments(input_ids=BATCH["input_ids"])
    batch, x = architecture_of(model).embed(ids, 8)
    scores = [scorer(1, kind, x, batch) for kind in ("attention", "mlp") for _ in range(2)]
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[2], scores[3])
    assert torch.equal(torch.get_rng_state(), state)


def test_opt_drops_out_after_each_sub_block():
    model = make_model("opt", dropout=0.5)
    lemo.enable(model, EVERYTHING)
    assert model(**BATCH).loss != model(**BATCH).loss
    model = make_model("opt", dropout=1.0)
    lemo.enable(model, EVERYTHING)
    entry, *others, _ = model(**BATCH, output_hidden_states=True).hidden_states
    assert all(torch.equal(state, entry) for state in others), "a sub-block escaped the dropout"


@pytest.fixture
def mixed_precision():
    AcceleratorState._reset_state(True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(True)


@pytest.mark.cpu_only
def test_accelerate_prepares_afterwards(mixed_precision):
    model, dense = make_model("llama"), make_model("llama")
    handle = lemo.enable(model, HALF)
    model = mixed_precision.prepare(model)
    outputs = model(**BATCH)
    assert handle.statistics()[0].attention_rows < 101
    with torch.autocast("cpu", torch.bfloat16):
        lemo.enable(dense, HALF)
        assert torch.equal(outputs.loss, dense(**BATCH).loss)
    handle.remove()
    assert model(**BATCH).loss.dtype == torch.float32, "Accelerate's wrapper stays"
    with torch.autocast("cpu", torch.bfloat16):
        expected = make_model("llama")(**BATCH).loss
    assert torch.equal(model(**BATCH).loss, expected)
    mixed_precision.unwrap_model(model, keep_fp32_wrapper=False)
    assert torch.equal(model(**BATCH).loss, make_model("llama")(**BATCH).loss)


@pytest.mark.cpu_only
def test_accelerate_prepared_before_is_refused(mixed_precision):
    model = mixed_precision.prepare(make_model("llama"))
    with pytest.raises(ValueError, match="call lemo.enable before Accelerator.prepare"):
        lemo.enable(model, HALF)


@fp32
def test_models_over_several_devices_run_in_the_generic_path():
    model, dense = make_model("llama"), make_model("llama")
    for module in model.modules():  # as a device_map does
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    with pytest.raises(ValueError, match="a device_map over several .* LemoConfig.path='generic'"):
        lemo.enable(model, EVERYTHING)
    lemo.enable(model, lemo.LemoConfig(keep=1, path="generic"))
    for each in (model, dense):
        each(**BATCH).loss.backward()
    for name, expected in gradients(dense).items():
        assert_close_fp32(gradients(model)[name], expected, name)


@pytest.mark.cpu_only
@pytest.mark.parametrize("path", ["native", "generic"])
def test_copies_of_data_parallel_are_refused(path):
    model = make_model("llama")
    lemo.enable(model, lemo.LemoConfig(path=path))
    with pytest.raises(NotImplementedError, match="one process for each GPU, got torch.nn.DataPar"):
        model._replicate_for_data_parallel()(**BATCH)  # as torch.nn.DataParallel makes them
    assert model(**BATCH).loss > 0


def trainer_arguments(folder, **settings):
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )


@pytest.mark.cpu_only
def test_the_trainer_of_transformers(tmp_path):
    def train(eliminate):
        model = make_model("llama")
        if eliminate:
            lemo.enable(model, EVERYTHING)
        rows = [{"input_ids": row, "labels": row, "unused": 1} for row in make_ids(8, 30)]
        arguments = trainer_arguments(tmp_path, max_steps=2, logging_steps=1, save_strategy="no")
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        return torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])

    assert_close_fp32(train(True), train(False), "losses")


@pytest.mark.cpu_only
def test_a_resumed_trainer_keeps_what_one_without_interruption_keeps(tmp_path):
    schedule = [[0.0, 0.25], [0.5, 0.5]]
    config = config_of(
        **{"dense_layers": [], "block_size": 4, "scorer": "random"}, keep_schedule=schedule
    )
    rows = [{"input_ids": row, "labels": row} for row in make_ids(8, 64)]

    class Kept(transformers.TrainerCallback):
        def __init__(self, handle):
            self.handle, self.blocks = handle, []

        def on_step_end(self, *_, **__):
            self.blocks.append(self.handle.statistics()[0].attention_blocks.tolist())

    def train(folder, checkpoint=None):
        model = make_model("llama")
        handle = lemo.enable(model, config)
        arguments = trainer_arguments(folder, max_steps=4, save_steps=2)
        kept = Kept(handle)
        callbacks = [lemo.TrainerCallback(handle), kept]
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=checkpoint)
        return kept.blocks

    whole = train(tmp_path / "whole")
    assert [len(blocks) for blocks in whole] == [8, 8, 16, 16]
    assert len({tuple(blocks) for blocks in whole}) == 4
    assert train(tmp_path / "rest", str(tmp_path / "whole" / "checkpoint-2")) == whole[2:]


def test_the_callback_wants_a_handle():
    with pytest.raises(TypeError, match="handle: expected what lemo.enable returns, got Llama"):
        lemo.TrainerCallback(make_model("llama"))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda h: h.set_progress("a"), TypeError, "progress: expected a number, got 'a'"),
        (lambda h: h.set_progress(True), TypeError, "progress: expected a number, got True"),
        (lambda h: h.set_progress(1.5), ValueError, "progress: expected a share .* got 1.5"),
        (lambda h: h.begin_step(5, 4), ValueError, "step: .* between 0 and steps = 4, got 5"),
        (lambda h: h.begin_step(-1, 4), ValueError, "step: .* between 0 and steps = 4, got -1"),
        (lambda h: h.begin_step(0.5, 4), TypeError, "step: expected a whole number, got 0.5"),
        (lambda h: h.begin_pass(1.0), TypeError, "index: expected a whole number, got 1.0"),
    ],
)
def test_a_bad_place_in_the_training_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(lemo.enable(make_model("llama"), HALF))


def test_the_signature_stays():
    model, plain = make_model("opt"), make_model("opt")
    lemo.enable(model, HALF)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    ids, mask = BATCH["input_ids"], BATCH["attention_mask"]
    assert model(ids, mask, None, None, BATCH["labels"]).loss.isfinite()


# Errors


def test_unsupported_models_are_named():
    with pytest.raises(TypeError, match="expected a torch module, got str"):
        lemo.enable("model", HALF)
    small = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    bert = BertForMaskedLM(BertConfig(vocab_size=9, num_hidden_layers=1, **small))
    with pytest.raises(TypeError, match="expected a causal LM .* got BertForMaskedLM"):
        lemo.enable(bert, HALF)
    with pytest.raises(TypeError, match="got LlamaModel"):
        lemo.enable(LlamaModel(make_model("llama").config), HALF)
    with pytest.raises(TypeError, match="config: expected a LemoConfig, got dict"):
        lemo.enable(make_model("llama"), {"keep": 0.5})


class Distillation(torch.nn.Module):
    """A teacher and its student, as one model for a trainer."""

    def __init__(self, teacher, student):
        super().__init__()
        self.teacher, self.student = teacher, student

    def forward(self, **batch):
        with torch.no_grad():
            self.teacher(**batch)
        return self.student(**batch)


@pytest.mark.parametrize("path", ["native", "generic"])
def test_two_causal_lms_in_one_model_are_refused(path):
    """lemo would run on the first of them, whichever is trained."""
    model = Distillation(make_model("llama").requires_grad_(False), make_model("qwen3"))
    settings = lemo.LemoConfig(keep=0.5, block_size=8, path=path)
    with pytest.raises(ValueError, match="one causal LM inside Distillation, got a LlamaForCausal"):
        lemo.enable(model, settings)
    handle = lemo.enable(model.student, settings)
    ids = make_ids(1, 40)
    model(input_ids=ids, labels=ids).loss.backward()
    assert handle.statistics()[0].attention_rows == 24


def test_enabling_twice_is_refused():
    model = make_model("llama")
    lemo.enable(model, HALF)
    with pytest.raises(ValueError, match="already enabled"):
        lemo.enable(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), HALF)


@pytest.mark.parametrize(
    ("architecture", "overrides", "message"),
    [
        ("llama", {"attention_dropout": 0.1}, "expected attention_dropout 0, got 0.1 in layer 0"),
        ("opt", {"attention_dropout": 0.1}, "expected attention_dropout 0, got 0.1 in layer 0"),
        ("opt", {"layerdrop": 0.2}, "expected layerdrop 0, got 0.2"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=True, got False"),
        ("llama", {"is_causal": False}, "is_causal=False"),
    ],
)
def test_unsupported_settings_are_named(architecture, overrides, message):
    model = make_model(architecture, **overrides)
    with pytest.raises(ValueError, match=message):
        lemo.enable(model, HALF)
    assert "forward" not in vars(model), "a failed enable left something behind"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 61, 61)}, ValueError, r"attention_mask: .*\[2, 1, 61"),
        ({"attention_mask": {"full_attention": None}}, TypeError, "attention_mask: .* got dict"),
        ({"attention_mask": torch.zeros(2, 61)}, ValueError, "got only zeros"),
        (
            {"attention_mask": torch.ones(2, 61).index_fill(1, torch.tensor([9]), 0)},
            ValueError,
            "contiguous .* got 2 runs in row 0",
        ),
        ({"output_attentions": True}, ValueError, "output_attentions: not available"),
        ({"inputs_embeds": torch.zeros(2, 61, HIDDEN)}, ValueError, "exactly one of input_ids"),
        ({"cu_seq_lens_q": torch.tensor([0, 61])}, ValueError, "position_ids: expected for packed"),
        ({"position_ids": torch.arange(60)[None]}, ValueError, r"position_ids: .* got \[1, 60\]"),
        ({"position_ids": torch.zeros(3, 61)}, ValueError, r"position_ids: .* got \[3, 61\]"),
        ({"position_ids": torch.zeros(3, 2, 61)}, ValueError, r"position_ids: .* \[3, 2, 61\]"),
        ({"input_ids": make_ids(1, 9)[0]}, ValueError, r"input_ids: .*tokens\], got \[9\]"),
        ({"input_ids": make_ids(1, 9)[None]}, ValueError, r"tokens\], got \[1, 1, 9\]"),
        ({"labels": make_ids(2, 60)}, ValueError, r"labels: expected .*\[2, 61\], got \[2, 60\]"),
    ],
)
def test_bad_inputs_are_named(arguments, error, message):
    model = make_model("llama")
    lemo.enable(model, HALF)
    with pytest.raises(error, match=message):
        model(**{"input_ids": make_ids(2, 61), "labels": make_ids(2, 61), **arguments})


@fp32
def test_a_loss_function_of_ones_own_gets_the_dense_logits():
    model, dense = make_model("llama"), make_model("llama")
    lemo.enable(model, HALF)

    def loss_function(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
        return logits.logsumexp(-1)[labels > 3].sum() / (num_items_in_batch * vocab_size)

    for each in (model, dense):
        each.loss_function = loss_function
    batch = {**packed_batch([30, 20]), "num_items_in_batch": 9, "use_cache": False}
    outputs, expected = model(**batch), dense(**batch)
    assert_close_fp32(outputs.loss, expected.loss)
    assert_close_fp32(outputs[0], expected[0], "the loss comes first")
