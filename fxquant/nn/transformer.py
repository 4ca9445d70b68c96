"""torch's transformer modules without their native fast path, which reads their children's weights without calling the
children.

`PLAIN_FORWARDS` is what the tracer traces in the place of their own forwards, which branch on tensors: the same
arithmetic, child by child. `avoid_fast_path` is for modules that are not traced and run their own code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function

from fxquant.errors import DTypeError


def avoid_fast_path(module: nn.Module) -> None:
    """Have one of torch's transformer modules call its children, whatever torch.backends.mha allows.

    A forward uses these attributes only to decide about its native kernel and nested tensors.
    """
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0
    elif isinstance(module, nn.TransformerEncoder):
        module.use_nested_tensor = False


def additive_mask(mask: Any, like: torch.Tensor) -> Any:
    """Return a mask as what is added to scores in like's dtype: -inf where a bool one is True; None for None.

    Raises DTypeError for a mask that is neither bool nor floating point.
    """
    if has_torch_function((mask, like)):
        return handle_torch_function(additive_mask, (mask, like), mask, like)
    if mask is None:
        return None
    if mask.is_floating_point():
        return mask.to(like.dtype)
    if mask.dtype != torch.bool:
        raise DTypeError(f"an attention mask is bool or floating point, got {mask.dtype}; call mask.bool()")
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


def causal_hint(is_causal: Any, mask: Any) -> bool:
    """Return whether a self-attention's mask is the causal one: as is_causal says, or, where it is None, by its values.

    torch's encoder and decoder do the same, and pick another kernel then. A compiler does not see the values.
    """
    if has_torch_function((is_causal, mask)):
        return handle_torch_function(causal_hint, (is_causal, mask), is_causal, mask)
    if is_causal is not None or mask is None or torch.compiler.is_compiling():
        return bool(is_causal)
    causal = nn.Transformer.generate_square_subsequent_mask(mask.shape[-1], mask.device, mask.dtype)
    return mask.shape == causal.shape and bool((mask == causal).all())


def _encoder_layer(
    self: Any, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = False
) -> Any:
    masks = additive_mask(src_mask, src), additive_mask(src_key_padding_mask, src)
    if self.norm_first:
        x = src + self._sa_block(self.norm1(src), *masks, is_causal=is_causal)
        return x + self._ff_block(self.norm2(x))
    x = self.norm1(src + self._sa_block(src, *masks, is_causal=is_causal))
    return self.norm2(x + self._ff_block(x))


def _encoder(self: Any, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None) -> Any:
    masks = {"src_mask": additive_mask(mask, src), "src_key_padding_mask": additive_mask(src_key_padding_mask, src)}
    hint = causal_hint(is_causal, masks["src_mask"])
    for layer in self.layers:
        src = layer(src, is_causal=hint, **masks)
    return src if self.norm is None else self.norm(src)


def _decoder(
    self: Any,
    tgt: Any,
    memory: Any,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    tgt_is_causal: Any = None,
    memory_is_causal: Any = False,
) -> Any:
    hint = causal_hint(tgt_is_causal, tgt_mask)
    for layer in self.layers:
        tgt = layer(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=hint,
            memory_is_causal=memory_is_causal,
        )
    return tgt if self.norm is None else self.norm(tgt)


def _transformer(
    self: Any,
    src: Any,
    tgt: Any,
    src_mask: Any = None,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    src_key_padding_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    src_is_causal: Any = None,
    tgt_is_causal: Any = None,
    memory_is_causal: Any = False,
) -> Any:
    memory = self.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal)
    return self.decoder(
        tgt,
        memory,
        tgt_mask=tgt_mask,
        memory_mask=memory_mask,
        tgt_key_padding_mask=tgt_key_padding_mask,
        memory_key_padding_mask=memory_key_padding_mask,
        tgt_is_causal=tgt_is_causal,
        memory_is_causal=memory_is_causal,
    )


PLAIN_FORWARDS: dict[Callable[..., Any], Callable[..., Any]] = {
    nn.TransformerEncoderLayer.forward: _encoder_layer,
    nn.TransformerEncoder.forward: _encoder,
    nn.TransformerDecoderLayer.forward: nn.TransformerDecoderLayer.forward,  # it calls its children as it is
    nn.TransformerDecoder.forward: _decoder,
    nn.Transformer.forward: _transformer,
}
"""Each of torch's forwards, which a subclass may inherit, and the one that is traced in its place."""
