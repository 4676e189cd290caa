"""Batches and settings that several tests of models run with."""

from tiny_models import config_of, make_ids, packed_batch, padded_batch

BLOCK = 8
EVERYTHING = config_of(keep=1.0, dense_layers=[], block_size=BLOCK)


def plain_batch():
    ids = make_ids(2, 37)
    return {"input_ids": ids, "labels": ids}


DENSE_BATCHES = {
    "plain": plain_batch,
    "padded right": lambda: padded_batch([37, 1, 20]),
    "padded left": lambda: padded_batch([37, 20], side="left"),
}
BATCHES = {
    "right": lambda: padded_batch([61, 8, 45]),
    "left": lambda: padded_batch([50, 30], side="left"),
    "packed": lambda: packed_batch([40, 3, 37]),
}
SETTINGS = {
    "shared set": {"keep": 0.5},
    "own sets": {"keep": 0.4, "keep_mlp": 0.6, "select_at": "all"},
    "all keys": {"keep": [0.3, 0.5, 1.0], "select_at": "all", "visible_keys": "all"},
    "computed keys": {"keep": 0.5, "visible_keys": "computed"},
    "computed keys, own sets": {
        "keep": [0.3, 0.5, 1.0],
        "keep_mlp": 0.5,
        "select_at": "all",
        "group_size": 20,
        "visible_keys": "computed",
    },
    "groups": {"keep": 0.6, "group_size": 20, "dense_layers": [1]},
    "nothing forced": {"keep": 0.0, "keep_first": 0, "keep_last": 0, "dense_layers": [0]},
    "threshold": {"policy": "threshold", "thresholds": [0.07] * 3, "mlp_thresholds": [0.2] * 3},
    "random": {"keep": 0.3, "scorer": "random", "mask_loss": False},
}


def preset(name):
    return config_of(**{"dense_layers": [], "block_size": BLOCK} | SETTINGS[name])
