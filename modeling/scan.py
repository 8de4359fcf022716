"""The selective scan of Mamba (Gu 2023) for training on a CPU: linear in time, small in memory.

    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t        y_t = C_t . h_t

transformers' own torch path back-propagates through a slice of one (B, D, L, N) tensor a step, and
each slice's gradient is a whole such tensor of zeros: quadratic in L. Here both recurrences,

    forward   h_t = b_t + a_t h_{t-1}            a_t = exp(delta_t A), b_t = delta_t u_t B_t
    backward  g_t = C_t dy_t + a_{t+1} g_{t+1}   g_t = dL/dh_t

are one in-place multiply-add a step, over a piece of time that stays in the cache. Only the state
before each piece is kept; the backward pass makes the piece's states again. With these,

    du = delta s      dB = sum_d delta u g      s = sum_n g B        dC = sum_d dy h
    ddelta = u s + sum_n p A                    dA = sum_t delta p   p = g a_t h_{t-1}

Letters: B rows, L tokens, D inner width, N state size.

Two blocks of mamba-130m, a row of 256 tokens, forward and backward on one core that other work
shares: 0.35 to 0.40 CPU-seconds; transformers 4.6 (10.2 to 13.4 times; benchmarks/scan.py). Of
that, 0.2 are matrix products, at 60 GFLOP/s; a block's scan takes 0.05, its convolution 0.01.
Compiled by numba, scan and convolution took a third of that, and the whole 0.24 to 0.26 seconds
(13.9 to 15.4 times): not worth 208 MB of packages and 20 seconds of compiling.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, MethodType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.models.mamba import modeling_mamba

from modeling.causal_conv import causal_conv1d

LOG2_E = 1 / math.log(2)
PIECE_ELEMENTS = 1 << 18  # of a piece's states (time x B x N x D): 1 MB in float32


def mixers_of(model: PreTrainedModel) -> list[modeling_mamba.MambaMixer]:
    """The Mamba-1 mixers of a model; none in most."""
    return [m for m in model.modules() if isinstance(m, modeling_mamba.MambaMixer)]


@contextlib.contextmanager
def fast_scan(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Let a model's Mamba blocks scan with `selective_scan`; everything else stays the model's own.

    Only this model, only inside the `with`. A backward pass may come after it. Raises ValueError
    for a model without MambaMixer, or a transformers whose mixer calls no `mamba_selective_scan`.
    """
    if not (mixers := mixers_of(model)):
        raise ValueError(
            f"{type(model).__name__} has no MambaMixer; fast_scan is for MambaForCausalLM"
        )
    forward = _rebound(modeling_mamba.MambaMixer.forward)
    before = [vars(mixer).get("forward") for mixer in mixers]
    try:
        for mixer in mixers:
            mixer.forward = MethodType(forward, mixer)
        yield model
    finally:
        for mixer, own in zip(mixers, before, strict=True):
            if own is None:
                del mixer.forward
            else:
                mixer.forward = own


def _rebound(forward: Callable) -> Callable:
    """The mixer's own forward, in which two names mean something else.

    Its globals are copied, so that no other model notices. The fused kernel is bound to "not here":
    where mamba_ssm is installed, transformers would call it for tensors on the CPU, too.
    """
    source = inspect.unwrap(forward)
    names = {
        "mamba_selective_scan": selective_scan,
        "causal_conv1d_fn": causal_conv1d,
        "mamba_inner_fn": lambda *_, **__: None,
    }
    if missing := set(names) - set(source.__code__.co_names):
        raise ValueError(
            f"MambaMixer.forward of this transformers calls no {', '.join(sorted(missing))}; "
            "modeling/scan.py was written for 5.23"
        )
    return FunctionType(source.__code__, vars(modeling_mamba) | names, source.__name__,
                        source.__defaults__, source.__closure__)  # fmt: skip


def selective_scan(
    hidden_states: Tensor,  # (B, D, L), u
    dt: Tensor,  # (B, D, L)
    A: Tensor,  # (D, N), negative
    B: Tensor,  # (B, N, L)
    C: Tensor,  # (B, N, L)
    D: Tensor | None = None,  # (D,), of the skip connection
    z: Tensor | None = None,  # (B, D, L), the gate
    delta_bias: Tensor | None = None,  # (D,)
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: bool,  # which other implementation to take
) -> Tensor | tuple[Tensor, Tensor]:
    """What transformers' mamba_selective_scan gives, (B, D, L), and (B, D, N) if asked for.

    Computes in float32 at least, and gives the type of `hidden_states`.
    """
    exact = torch.promote_types(hidden_states.dtype, torch.float32)
    # (L, B, ...): a view of what was projected in the order (B, L, D)
    over_time = (None if x is None else x.to(exact).permute(2, 0, 1)
                 for x in (hidden_states, dt, B, C, z))  # fmt: skip
    of_width = (None if x is None else x.to(exact) for x in (D, delta_bias))
    y, last = _Scan.apply(*over_time, A.to(exact).T.contiguous(), *of_width, delta_softplus)
    y = y.permute(1, 2, 0).to(hidden_states.dtype)
    return (y, last.transpose(1, 2)) if return_last_state else y


class _Scan(torch.autograd.Function):
    """u, dt, z (L, B, D); B, C (L, B, N); A (N, D); D, bias (D,) -> y (L, B, D), state (B, N, D).

    All that is done token by token is done within a piece, too, where it is in the cache.
    """

    @staticmethod
    def forward(ctx, u, dt, B, C, z, A, D, bias, softplus):
        dt = dt.contiguous()
        pieces = _pieces(u, A)
        room = _room(2, pieces, u, A)
        carry = u.new_zeros(u.shape[1], *A.shape)
        y, starts, binary = u.new_empty(u.shape), [], A * LOG2_E
        for part in pieces:
            starts.append(carry)
            delta, _ = _delta(dt[part], bias, softplus)
            states, _ = _states(u[part], delta, B[part], binary, carry, room)
            out = _read(C[part], states, D, u[part])
            y[part] = out if z is None else out.mul_(F.silu(z[part]))
            carry = states[-1].clone()
        ctx.softplus = softplus
        ctx.save_for_backward(u, dt, B, C, z, A, D, bias, *starts)
        return y, carry

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, carry):
        u, dt, B, C, z, A, D, bias, *starts = ctx.saved_tensors
        du, ddt, dB, dC, dz, dA, dD, dbias = (
            None if x is None else x.new_empty(x.shape) for x in (u, dt, B, C, z, A, D, bias)
        )
        for total in (dA, dD, dbias):
            if total is not None:
                total.zero_()
        pieces, binary = _pieces(u, A), A * LOG2_E
        *room, of_g, spare = _room(4, pieces, u, A)
        for part, start in reversed(list(zip(pieces, starts, strict=True))):
            delta, slope = _delta(dt[part], bias, ctx.softplus)
            input = delta * u[part]
            states, decay = _states(u[part], delta, B[part], binary, start, room)
            dy = gradient[part]
            if z is not None:
                silu, out = F.silu(z[part]), _read(C[part], states, D, u[part])
                dz[part] = torch.ops.aten.silu_backward(out.mul_(dy), z[part])
                dy = dy * silu
            products, g = spare[: len(states)], of_g[: len(states)]
            dC[part] = torch.mul(states, dy[:, :, None], out=products).sum(-1)
            carry = _back(torch.mul(C[part, ..., None], dy[:, :, None], out=g), decay, carry)
            s = _over_n(B[part], g)
            dB[part] = torch.mul(g, input[:, :, None], out=products).sum(-1)
            du[part] = delta * s if D is None else torch.addcmul(delta * s, dy, D)
            p = g.mul_(decay)
            p[1:].mul_(states[:-1])
            p[0].mul_(start)
            dA += torch.mul(p, delta[:, :, None], out=products).sum((0, 1))
            ddelta = p.mul_(A).sum(2).addcmul_(u[part], s)
            ddt[part] = ddelta if slope is None else ddelta.mul_(slope)
            if dD is not None:
                dD += (dy * u[part]).sum((0, 1))
            if dbias is not None:
                dbias += ddelta.sum((0, 1))
        return du, ddt, dB, dC, dz, dA, dD, dbias, None


def _delta(dt: Tensor, bias: Tensor | None, softplus: bool) -> tuple[Tensor, Tensor | None]:
    """Steps of time (T, B, D), and their slope by dt where it is not 1."""
    raw = dt if bias is None else dt + bias
    return (F.softplus(raw), raw.sigmoid()) if softplus else (raw, None)


def _read(C: Tensor, states: Tensor, D: Tensor | None, u: Tensor) -> Tensor:
    """What is seen of a piece's states, before the gate: (T, B, D)."""
    seen = _over_n(C, states)
    return seen if D is None else seen.addcmul_(u, D)


def _back(g: Tensor, decay: Tensor, carry: Tensor) -> Tensor:
    """The recurrence of gradients over a piece, in place; what is carried to the piece before."""
    steps, factors = g.unbind(), decay.unbind()
    later = steps[-1].add_(carry)
    for step, factor in zip(steps[-2::-1], factors[:0:-1], strict=True):
        later = step.addcmul_(factor, later)
    return later * factors[0]


def _over_n(weights: Tensor, states: Tensor) -> Tensor:
    """Sum over the state: (T, B, N), (T, B, N, D) -> (T, B, D)."""
    return (weights[:, :, None] @ states)[:, :, 0]


def _pieces(u: Tensor, A: Tensor) -> list[slice]:
    """Pieces of time, whose states have about PIECE_ELEMENTS."""
    tokens, rows, _ = u.shape
    size = max(1, PIECE_ELEMENTS // (rows * A.numel()))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _room(count: int, pieces: list[slice], u: Tensor, A: Tensor) -> Tensor:
    """Memory for what the longest piece needs, used for all: fresh memory costs more than sums."""
    return u.new_empty(count, pieces[0].stop, u.shape[1], *A.shape)


def _states(
    u: Tensor, delta: Tensor, B: Tensor, binary: Tensor, start: Tensor, room: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """A piece's states h and decays a, (T, B, N, D) each, from the state before it.

    binary: A / ln 2, because 2 to a power takes half the time of e to one.
    """
    states, decay = (memory[: len(u)] for memory in room)
    torch.mul(delta[:, :, None], binary, out=decay).exp2_()
    torch.mul(B[..., None], (delta * u)[:, :, None], out=states)
    before = start
    for step, factor in zip(states.unbind(), decay.unbind(), strict=True):
        before = step.addcmul_(factor, before)
    return states, decay
