"""What users do between steps of training, as functions of a `graph_runs.Run`.

`SCENARIOS` has them by name, with how often passes are replayed in them at least, and the settings
of their runs. The bits of losses and gradients have to be the same with CUDA graphs and without
(test_cuda_graphs_between_steps.py).
"""

import copy
import tempfile

import torch
import torch.distributed as dist
from peft import LoraConfig
from torch import nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments

import lemo
from graph_runs import TOKENS, VOCABULARY

SCENARIOS = {}


def scenario(replays=2, **settings):
    """Adds a function to SCENARIOS.

    Args:
        replays: of passes, at least.
        settings: arguments of `Run`.
    """

    def add(function):
        SCENARIOS[function.__name__] = function, replays, settings
        return function

    return add


@scenario(4)
def plain(run):
    run.steps(6)


@scenario(4, fp32=True)
def fp32_adapters(run):
    run.steps(6)


@scenario(4, kind="qwen3")
def qwen3(run):
    run.steps(6)


@scenario(4, adapters={"lora_dropout": 0.2})
def dropout_and_seeds(run):
    run.steps(4)
    torch.manual_seed(77)
    run.steps(2)


@scenario(4, adapters={"use_dora": True})
def dora(run):
    run.steps(6)


@scenario(4, fp32=True)
def autocast_switched(run):
    for on in (False, True, True, False, True, False, True):
        with torch.autocast(run.device, dtype=torch.bfloat16, enabled=on):
            loss = run.forward()
        loss.backward()
        run.note(loss)
        run.update()


@scenario(4)
def adapters_switched_and_added(run):
    run.steps(3)
    torch.manual_seed(5)
    run.model.add_adapter("other", LoraConfig(**run.lora))
    for p in run.model.parameters():
        p.data = p.data.to(torch.bfloat16)
    run.model.set_adapter("other")
    run.steps(3)
    run.model.set_adapter("default")
    run.steps(3)
    run.model.base_model.set_adapter(["default", "other"])
    run.steps(3)
    run.model.set_adapter("default")
    run.model.delete_adapter("other")
    run.steps(2)


@scenario(2)
def adapters_merged_and_unmerged(run):
    run.steps(3)
    run.model.merge_adapter()
    with torch.no_grad():
        run.say(run.handle.loss(input_ids=run.ids(), labels=run.ids()))
    run.model.unmerge_adapter()
    run.steps(3)


@scenario(2)
def adapters_disabled(run):
    run.steps(3)
    with run.model.disable_adapter():
        run.say(run.forward().detach())
        run.say(run.forward().detach())
    run.steps(3)


@scenario(3)
def scaling_and_dropout_changed(run):
    run.steps(3)
    for module in run.model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["default"] *= 0.5
    run.steps(3)
    for module in run.model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(0.1)
    run.steps(3)


@scenario(5)
def optimizers(run):
    for make in (
        lambda: torch.optim.AdamW(run.trained, lr=1e-3),
        lambda: torch.optim.SGD(run.trained, lr=1e-2, momentum=0.9),
        lambda: torch.optim.AdamW(run.trained, lr=1e-3, foreach=True),
    ):
        optimizer = make()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for _ in range(3):
            loss = run.forward()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(run.trained, 0.1)
            run.note(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)


@scenario(6)
def accumulation_and_zero_grad(run):
    for step in range(4):
        for _ in range(3):
            loss = run.forward()
            (loss / 3).backward()
        run.note(loss)
        run.update(none=step % 2 == 0)


@scenario(5)
def gradients_written_in_place(run):
    for _ in range(7):
        loss = run.forward()
        loss.backward()
        for p in run.trained:
            p.grad.mul_(0.5)
            p.grad += 1e-3
        run.note(loss)
        run.update()


@scenario(4)
def scaled_loss(run):
    for _ in range(6):
        loss = run.forward()
        (1024 * loss).backward()
        for p in run.trained:
            p.grad.div_(1024)
        run.note(loss)
        run.update()


@scenario(1)
def module_hooks_come_and_go(run):
    run.steps(3)
    for part in (
        run.layers[1].self_attn.q_proj.base_layer,
        run.layers[1].mlp.up_proj,
        run.layers[0].input_layernorm,
        run.layers[0].mlp.act_fn,
        run.layers[1].mlp.down_proj.lora_A["default"],
    ):
        called = []
        hook = part.register_forward_hook(lambda *_, to=called: to.append(1))
        run.steps(3)
        run.say(len(called))
        hook.remove()
    run.steps(2)


@scenario(0)
def hook_on_the_activation_from_the_start(run):
    called = []
    run.layers[0].mlp.act_fn.register_forward_hook(lambda *_: called.append(1))
    run.steps(5)
    run.say(len(called))


@scenario(0, kind="qwen3")
def hook_on_a_norm_of_heads(run):
    called = []
    run.layers[0].self_attn.q_norm.register_forward_hook(lambda *_: called.append(1))
    run.steps(5)
    run.say(len(called))


@scenario(10)
def gradient_hooks(run):
    """There while a pass is captured, gone, and others for the same graph."""
    seen = []
    hook = run.trained[1].register_hook(lambda g: seen.append(g.sum()))
    run.steps(3)
    hook.remove()
    run.steps(2)
    hook = run.trained[3].register_hook(lambda g: g * 2)
    run.steps(3)
    run.trained[3].register_hook(lambda g: g.add_(1e-3))
    run.steps(1)
    hook.remove()
    after = run.trained[2].register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.sum()))
    run.steps(3)
    run.say(len(seen))
    run.say(sum(seen))
    after.remove()


@scenario(6)
def optimizer_in_backward(run):
    def after(p):
        with torch.no_grad():
            p.add_(p.grad, alpha=-0.01)
        p.grad = None

    hooks = [p.register_post_accumulate_grad_hook(after) for p in run.trained]
    for _ in range(8):
        loss = run.forward()
        loss.backward()
        run.found.append((loss.detach().clone(), {}))
    for hook in hooks:
        hook.remove()


@scenario(4)
def state_saved_and_loaded(run):
    run.steps(3)
    state = {n: x.clone() for n, x in run.model.state_dict().items()}
    run.steps(2)
    run.model.load_state_dict(state)
    run.steps(2)
    run.model.load_state_dict({n: x.clone() for n, x in state.items()}, assign=True)
    for p in run.model.parameters():
        p.requires_grad_(False)
    for n, p in run.model.named_parameters():
        p.requires_grad_("lora_" in n)
    run.model.get_base_model().tie_weights()
    run.steps(3)


@scenario(2)
def moved_to_the_cpu_and_back(run):
    run.steps(3)
    run.model.to("cpu")
    junk = torch.randn(2**20, device=run.device)
    run.model.to(run.device)
    del junk
    run.steps(4)


@scenario(3)
def eval_and_generation_between_steps(run):
    run.steps(3)
    for _ in range(3):
        run.model.eval()
        with torch.no_grad():
            ids = run.ids()
            run.say(run.model(input_ids=ids, labels=ids).loss)
            run.say(run.handle.loss(input_ids=ids, labels=ids))
            made = run.model.generate(
                input_ids=ids[:, :16],
                max_new_tokens=4,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
            run.say(made.sum())
        run.model.train()
        run.step()


@scenario(8)
def many_lengths(run):
    for _ in range(3):
        for parts in range(1, 12):
            run.step(tokens=TOKENS // 4 * parts)


@scenario(4)
def exceptions_and_skipped_backward(run):
    run.steps(3)
    kept = []
    for _ in range(3):
        try:
            loss = run.forward()
            if len(kept) == 1:
                kept.append(loss)
            raise FloatingPointError("a guard")
        except FloatingPointError:
            kept.append(None)
        run.step()
    kept.clear()
    del loss
    run.steps(2)


@scenario(3)
def two_passes_before_backward(run):
    run.steps(3)
    losses = [run.forward(), run.forward()]
    sum(losses).backward()
    run.note(losses[0])
    run.update()
    del losses
    run.steps(2)


@scenario(4, settings={"recompute": "layer"})
def backward_twice(run):
    run.steps(3)
    for _ in range(2):
        loss = run.forward()
        once = torch.autograd.grad(loss, run.trained, retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
        run.note(loss)
        run.say(sum(x.float().sum() for x in once))
        run.update()
    run.steps(2)


@scenario(3)
def checkpointing_switched(run):
    run.steps(3)
    run.model.gradient_checkpointing_enable({"use_reentrant": False})
    run.model.enable_input_require_grads()
    run.steps(3)
    run.model.gradient_checkpointing_disable()
    run.steps(3)


@scenario(4, settings={"recompute": "auto"})
def planned(run):
    run.steps(6)


@scenario(4, settings={"recompute": "layer"})
def recomputed(run):
    run.steps(6)


@scenario(2)
def anomaly_detection(run):
    run.steps(3)
    with torch.autograd.detect_anomaly(check_nan=True):
        run.steps(2)
    run.steps(2)


@scenario(2)
def saved_tensors_hooks(run):
    run.steps(3)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (seen.append(1), x)[1], lambda x: x):
        run.steps(3)
    run.say(len(seen))
    run.steps(2)


@scenario(2)
def flop_counter(run):
    run.steps(3)
    for _ in range(3):
        with FlopCounterMode(display=False) as counter:
            run.step()
        run.say(counter.get_total_flops())
    run.steps(2)


@scenario(4)
def profiler(run):
    run.steps(3)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if run.device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds):
        run.steps(2)
    run.steps(2)


@scenario(3)
def requires_grad_changed(run):
    run.steps(3)
    some = [p for n, p in run.model.named_parameters() if "layers.0" in n and "lora_" in n]
    for p in some:
        p.requires_grad_(False)
    run.steps(3)
    for p in some:
        p.requires_grad_(True)
    run.steps(2)
    run.layers[1].post_attention_layernorm.weight.requires_grad_(True)
    run.steps(3)


@scenario(8)
def weights_written_through_data(run):
    run.steps(3)
    run.layers[0].mlp.up_proj.base_layer.weight.data.mul_(0.9)
    run.layers[1].input_layernorm.weight.data.add_(0.1)
    run.steps(2)
    average = [p.detach().clone() for p in run.trained]
    for _ in range(3):  # EMA swapped in and out, by pointers
        mine = [p.data for p in run.trained]
        for p, x in zip(run.trained, average):
            p.data = x
        with torch.no_grad():
            run.say(run.handle.loss(input_ids=run.ids(), labels=run.ids()))
        run.step()
        for p, x in zip(run.trained, mine):
            p.data = x
        run.step()
        for x, p in zip(average, run.trained):
            x.lerp_(p.detach(), 0.5)
    run.steps(2)


@scenario(2)
def parameter_replaced(run):
    run.steps(3)
    place = run.layers[0].self_attn.v_proj.lora_A["default"]
    place.weight = nn.Parameter(place.weight.data * 2)
    run.steps(3)
    # Another parameter in the same memory.
    place.weight = nn.Parameter(place.weight.data)
    run.steps(2)
    run.layers[0].mlp.act_fn = nn.GELU()
    run.steps(3)


@scenario(3)
def a_copy_is_trained_too(run):
    run.steps(3)
    other = copy.deepcopy(run.model)
    for _ in range(3):
        loss = run.forward(model=other)
        loss.backward()
        run.note(loss, other)
        other.zero_grad()
    run.steps(2)


@scenario(4)
def given_embeddings(run):
    for _ in range(6):
        run.seed += 1
        ids = run.ids()
        embedded = run.model.get_input_embeddings()(ids).detach().requires_grad_()
        torch.manual_seed(run.seed)
        loss = run.model(inputs_embeds=embedded, labels=ids).loss
        loss.backward()
        run.note(loss)
        run.found.append((loss.detach(), {"embedded": embedded.grad.clone()}))
        run.update()


@scenario(4)
def compiled_from_outside(run):
    model = torch.compile(run.model, backend="eager")
    run.steps(6, model=model)


@scenario(0)
def handle_removed(run):
    run.steps(4)
    run.handle.remove()
    with torch.no_grad():
        run.say(run.model(input_ids=run.ids(), labels=run.ids()).loss)
    run.handle = lemo.enable(run.model, run.handle.config)
    run.steps(4)


@scenario(3)
def ddp(run):
    backend, gpus = ("nccl", [0]) if run.device == "cuda" else ("gloo", None)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, f"file://{folder}/group", rank=0, world_size=1)
        try:
            model = nn.parallel.DistributedDataParallel(run.model, device_ids=gpus)
            run.steps(6, model=model)
            with model.no_sync():
                run.forward(model=model).backward()
            loss = run.forward(model=model)
            loss.backward()
            run.note(loss)
            run.update()
        finally:
            dist.destroy_process_group()


@scenario(0)
def trainer_with_checkpointing(run):
    class Data(Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, index):
            torch.manual_seed(1000 + index)
            ids = torch.randint(0, VOCABULARY, (TOKENS,))
            return {"input_ids": ids, "labels": ids}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=2,
            max_steps=6,
            report_to=[],
            bf16=True,
            gradient_checkpointing=True,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=run.device == "cpu",
            gradient_accumulation_steps=2,
        )
        trainer = Trainer(run.model, arguments, train_dataset=Data())
        run.handle.attach(trainer)
        trainer.train()
    for record in trainer.state.log_history:
        if "loss" in record:
            run.say(record["loss"])


@scenario(3)
def settings_of_torch(run):
    run.steps(3)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        run.steps(3)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    run.steps(2)
