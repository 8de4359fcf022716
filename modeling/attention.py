"""Let a model's attention modules call other code for a while, by transformers' own registry."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configurations inside a model, each once; they say which attention is called."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in found if isinstance(c, PreTrainedConfig)}.values())


@contextlib.contextmanager
def attention_by(
    configs: Iterable[PreTrainedConfig], name: str, attend: Callable, mask: Callable
) -> Iterator[None]:
    """Have the attention of these configurations computed by `attend`, within the context.

    name: what both are registered as.  mask: makes what `attend` gets as its mask.
    """
    before = [(config, config._attn_implementation) for config in configs]
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, own in before:
            config._attn_implementation = own
