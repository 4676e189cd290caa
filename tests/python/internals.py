"""What a training forward computes inside, which no output shows."""

from torch import Tensor

from lemo.models.calls.arguments import ForwardArguments
from lemo.models.layers.batch import Batch


def run_decoder(handle, arguments) -> tuple[Batch, Tensor, list[Tensor]]:
    """(batch, final residual [T, H], unpacked residual at each layer's entry), rows left out
    as they are: untouched by the layers that leave them out."""
    forward = handle._forward
    batch, embed = forward._begin(ForwardArguments.of(arguments))
    decoder = forward.elimination.decoder
    (residual, _), entries = forward._decode(decoder, batch, embed, None, True)
    return batch, residual, entries
