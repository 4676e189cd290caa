"""A model is evaluated in one thread while another one trains it, and both get what is right."""

import copy
import threading
from contextlib import contextmanager

import pytest
import torch

import lemo
from generic_cases import BLOCK, assert_same, kept_mask, make, masked_batch
from tiny_models import make_ids
from tolerances import assert_close_fp32

pytestmark = pytest.mark.cpu_only

IDS = make_ids(2, 61)
BATCH = {"input_ids": IDS, "labels": IDS}
OTHER_IDS = make_ids(1, 30, seed=7)
OTHER = {"input_ids": OTHER_IDS, "labels": OTHER_IDS.where(torch.arange(30) > 20, -100)}
WAIT = 60  # seconds

# Where in a step the other thread begins to evaluate, and where it ends.
TIMES = {
    "in the pass": ("embedding", "embedding"),
    "from before the pass to its middle": ("before", "embedding"),
    "from the middle of the pass on": ("embedding", "forward"),
    "around the pass": ("before", "forward"),
    "beside backward": ("forward", "backward"),
}


class Evaluation:
    """One call of a model in another thread, without gradients, that waits in its middle."""

    def __init__(self, model):
        self.output = self.error = None
        self._thread = threading.Thread(target=self._run, args=(model,))
        self._reached, self._goes_on = threading.Event(), threading.Event()
        model.model.rotary_emb.register_forward_pre_hook(self._wait)

    def _run(self, model):
        try:
            with torch.no_grad():
                self.output = model(**OTHER)
        except Exception as error:
            self.error = error
            self._reached.set()

    def _wait(self, *_):
        if threading.current_thread() is self._thread:
            self._reached.set()
            assert self._goes_on.wait(WAIT)

    def begin(self):
        self._thread.start()
        assert self._reached.wait(WAIT)

    def end(self):
        self._goes_on.set()
        self._thread.join(WAIT)
        if self.error is not None:
            raise self.error

    @contextmanager
    def at(self, model, first, last):
        """Begins and ends at given times; yields what is to be called at each of them."""

        def reach(time):
            if time == first:
                self.begin()
            if time == last:
                self.end()

        def embedded(*_):
            if threading.current_thread() is not self._thread:
                reach("embedding")

        with model.model.embed_tokens.register_forward_hook(embedded):
            yield reach


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("when", TIMES)
def test_the_generic_path(when, checkpointing):
    model = make("llama")
    dense = copy.deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    handle = lemo.enable(
        model, lemo.LemoConfig(keep=0.5, block_size=BLOCK, scorer="random", path="generic")
    )
    evaluation = Evaluation(model)
    with evaluation.at(model, *TIMES[when]) as reach:
        reach("before")
        loss = model(**BATCH, use_cache=False).loss
        reach("forward")
        kept = kept_mask(handle, BATCH)
        loss.backward()
        reach("backward")
    oracle = dense(**masked_batch(BATCH, kept)).loss
    oracle.backward()
    assert_same(model, dense, loss, oracle)
    with torch.no_grad():
        assert_close_fp32(evaluation.output.logits, dense(**OTHER).logits, "logits")
    assert model(**BATCH, use_cache=False).loss > 0


def test_labels_are_named_for_a_thread():
    """As by a trainer that computes the loss itself, in the native path."""
    model = make("llama")
    dense = copy.deepcopy(model)
    config = lemo.LemoConfig(keep=0.25, block_size=BLOCK, scorer="random")
    handle = lemo.enable(model, config)
    mask = (torch.arange(61) >= 53).expand(2, 61)
    evaluation = Evaluation(model)
    with handle.labelled(mask):
        evaluation.begin()
        logits = model(IDS).logits
    evaluation.end()
    assert_close_fp32(logits, dense(IDS).logits, "logits")
    assert_close_fp32(evaluation.output.logits, dense(**OTHER).logits, "logits")
    layout, kept = handle.statistics()[0].layout, handle.statistics()[0].attention_blocks.tolist()
    of_labels = layout.num_blocks // 2 - 1  # the last block of the first sequence
    assert {of_labels - 1, of_labels} <= {*kept}
