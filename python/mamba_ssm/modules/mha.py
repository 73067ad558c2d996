"""Attention for hybrid models: grouped heads, rotary positions, a convolution before and an MLP beside it."""

import torch
import torch.nn.functional as F
from torch import nn

from mamba_ssm.modules.cache import states_of_layer
from mamba_ssm.native.arguments import check_shapes
from mamba_ssm.ops.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)
from mamba_ssm.ops.sequences import sequence_of_steps


def rotate(x, positions, dim, base=10000.0, interleaved=False):
    """Rotary embedding (Su et al. 2021) of the first `dim` features of x (B, L, H, head_dim).

    positions: (B or 1, L). Pair i turns by position / base^(2i / dim); a pair is (i, i + dim/2), or neighbours where
    interleaved.
    """
    frequencies = base ** -(torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
    angles = (positions.unsqueeze(-1) * frequencies).unsqueeze(2)  # (B or 1, L, 1, dim / 2)
    axis = -1 if interleaved else -2
    shape = (-1, 2) if interleaved else (2, -1)
    first, second = x[..., :dim].float().unflatten(-1, shape).unbind(axis)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=axis)
    return torch.cat([turned.flatten(-2).to(x.dtype), x[..., dim:]], dim=-1)


class MHA(nn.Module):
    """Multi-head attention: maps (B, L, embed_dim) to the same shape.

    num_heads_kv: heads of keys and values, each for num_heads / num_heads_kv queries; None for as many.
    head_dim: embed_dim / num_heads when None. mlp_dim: width of a gated MLP beside the attention, rounded up to 256.
    d_conv: width of a causal convolution of queries, keys and values, 0 for none. rotary_emb_dim: features of a head
    that carry the position, 0 for none. softmax_scale: head_dim^-0.5 when None.
    layer_idx: this layer's key in the inference cache.
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        num_heads_kv=None,
        head_dim=None,
        mlp_dim=0,
        qkv_proj_bias=True,
        out_proj_bias=True,
        softmax_scale=None,
        causal=False,
        layer_idx=None,
        d_conv=0,
        rotary_emb_dim=0,
        rotary_emb_base=10000.0,
        rotary_emb_interleaved=False,
        device=None,
        dtype=None,
    ):
        factory = {"device": device, "dtype": dtype}
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        assert num_heads % self.num_heads_kv == 0, (
            f"num_heads must be a multiple of num_heads_kv, got {num_heads} and {num_heads_kv}"
        )
        assert head_dim is not None or embed_dim % num_heads == 0, (
            f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}"
        )
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        assert rotary_emb_dim % 2 == 0 and rotary_emb_dim <= self.head_dim, (
            f"rotary_emb_dim must be even and at most {self.head_dim}, got {rotary_emb_dim}"
        )
        self.mlp_dim = (mlp_dim + 255) // 256 * 256
        self.softmax_scale = softmax_scale
        self.causal = causal
        self.layer_idx = layer_idx
        self.d_conv = d_conv
        self.rotary_emb_dim = rotary_emb_dim
        self.rotary_emb_base = rotary_emb_base
        self.rotary_emb_interleaved = rotary_emb_interleaved

        self.q_dim = self.head_dim * self.num_heads
        self.qkv_dim = self.head_dim * (self.num_heads + 2 * self.num_heads_kv)
        self.in_proj = nn.Linear(
            embed_dim, self.qkv_dim + self.mlp_dim, bias=qkv_proj_bias, **factory
        )
        if d_conv > 0:
            self.conv1d = nn.Conv1d(
                self.qkv_dim,
                self.qkv_dim,
                kernel_size=d_conv,
                padding=d_conv - 1,
                groups=self.qkv_dim,
                **factory,
            )
        self.out_proj = nn.Linear(
            self.q_dim + self.mlp_dim // 2, embed_dim, bias=out_proj_bias, **factory
        )

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """Keys and values (B, max_seqlen, 2, num_heads_kv, head_dim), and conv_state (B, qkv_dim, d_conv) or None."""
        weight = self.out_proj.weight
        options = {"device": weight.device, "dtype": dtype or weight.dtype}
        kv_shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        conv_shape = (batch_size, self.qkv_dim, self.d_conv)
        conv_state = torch.zeros(conv_shape, **options) if self.d_conv > 0 else None
        return torch.zeros(kv_shape, **options), conv_state

    def forward(self, x, inference_params=None, seq_idx=None, cu_seqlens=None):
        """(B, L, embed_dim) -> (B, L, embed_dim); with inference_params the cache is written or continued.

        Positions go on from inference_params.seqlen_offset, or where lengths_per_sample (B) is set, from those.
        Sequences packed behind each other do not see each other, and the positions of each begin at 0. seq_idx: (B, L)
        int32, the sequence of each token; cu_seqlens: (S + 1) int32 or int64, batch 1, where they begin and the last one
        ends; either is enough. A prompt with inference_params takes cu_seqlens, and the cache has a row for each sequence;
        decoding goes on from there with lengths_per_sample.
        """
        batch, length, _ = x.shape
        kv_cache = conv_state = lengths = None
        offset = 0
        packed = seq_idx is not None or cu_seqlens is not None
        if inference_params is not None:
            offset = inference_params.seqlen_offset
            if packed and cu_seqlens is None:
                raise ValueError(
                    "a cache has a row for each packed sequence: MHA needs cu_seqlens beside "
                    "seq_idx and inference_params, got None"
                )
            rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
            kv_cache, conv_state = states_of_layer(self, inference_params, rows)
            packed = packed and offset == 0  # rows of the cache are a batch as any other
            if offset > 0:
                lengths = inference_params.lengths_per_sample
            if lengths is None and not packed and offset + length > kv_cache.shape[1]:
                raise ValueError(
                    f"the cache has room for {kv_cache.shape[1]} tokens, got {length} after {offset}"
                )
        positions = torch.arange(offset, offset + length, device=x.device).unsqueeze(0)
        if lengths is not None:  # on the device, so that a graph reads them anew
            positions = lengths.long().unsqueeze(1) + positions - offset
        mask = None
        if packed:
            seq_idx, positions, mask = self._sequences(x, seq_idx, cu_seqlens)

        qkv, mlp = self.in_proj(x).split([self.qkv_dim, self.mlp_dim], dim=-1)
        if self.d_conv > 0:
            packing = (seq_idx, cu_seqlens) if packed else (None, None)
            qkv = self._convolve(qkv.transpose(1, 2), conv_state, offset, *packing).transpose(1, 2)
        q, kv = qkv.split([self.q_dim, self.qkv_dim - self.q_dim], dim=-1)
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        kv = kv.unflatten(-1, (2, self.num_heads_kv, self.head_dim))
        if self.rotary_emb_dim > 0:
            k, v = kv.unbind(2)
            q, k = self._rotate(q, positions), self._rotate(k, positions)
            kv = torch.stack((k, v), dim=2)
        if kv_cache is not None and packed:
            self._store_sequences(kv_cache, kv, cu_seqlens)
        elif kv_cache is not None:
            kv, mask = self._continue(kv_cache, kv, positions, offset, lengths)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            *(part.transpose(1, 2) for part in kv.unbind(2)),
            attn_mask=mask,
            is_causal=self.causal and mask is None and offset == 0,
            scale=self.softmax_scale,
            enable_gqa=self.num_heads_kv != self.num_heads,
        )
        y = y.transpose(1, 2).flatten(2)
        if self.mlp_dim > 0:
            up, gate = mlp.chunk(2, dim=-1)
            y = torch.cat([y, up * F.silu(gate)], dim=-1)
        return self.out_proj(y)

    def _rotate(self, x, positions):
        return rotate(
            x,
            positions,
            self.rotary_emb_dim,
            self.rotary_emb_base,
            self.rotary_emb_interleaved,
        )

    def _sequences(self, x, seq_idx, cu_seqlens):
        """Packed tokens: (number of the sequence, position in it), both (B, L), and the mask (B, 1, L, L)."""
        batch, length, _ = x.shape
        if seq_idx is None:
            seq_idx, _ = sequence_of_steps("MHA", cu_seqlens, batch, length, x.device)
        check_shapes("MHA", [("seq_idx", seq_idx, (batch, length))])
        steps = torch.arange(length, device=x.device)
        begins = torch.zeros_like(seq_idx, dtype=torch.bool)
        begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        numbers = begins.cumsum(1, dtype=torch.int32)
        positions = steps - torch.where(begins, steps, 0).cummax(1).values
        mask = numbers.unsqueeze(2) == numbers.unsqueeze(1)
        if self.causal:
            mask = mask & (steps <= steps.unsqueeze(1))
        return numbers, positions, mask.unsqueeze(1)

    def _convolve(self, qkv, conv_state, offset, seq_idx, cu_seqlens):
        """(B, qkv_dim, L); the state keeps what comes in, not what comes out."""
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if offset > 0:
            out = causal_conv1d_update(qkv.to(conv_state.dtype), conv_state, weight, bias)
            return out.to(qkv.dtype)
        if conv_state is not None and cu_seqlens is not None:
            tokens = qkv.squeeze(0).transpose(0, 1)
            conv_state.copy_(causal_conv1d_varlen_states(tokens, cu_seqlens, self.d_conv))
        elif conv_state is not None:
            conv_state.copy_(F.pad(qkv, (self.d_conv - qkv.shape[2], 0)))
        return causal_conv1d_fn(qkv, weight, bias, seq_idx=seq_idx)

    def _store_sequences(self, kv_cache, kv, cu_seqlens):
        """Each sequence of a packed prompt into its row of the cache."""
        room, length = kv_cache.shape[1], kv.shape[1]
        bounds = cu_seqlens.to(kv.device, torch.long)
        if length > room and (longest := bounds.diff().max().item()) > room:
            raise ValueError(f"the cache has room for {room} tokens, got a sequence of {longest}")
        if length == 0:
            kv_cache.zero_()
            return
        steps = bounds[:-1, None] + torch.arange(room, device=kv.device)
        inside = (steps < bounds[1:, None])[..., None, None, None]
        kv_cache.copy_(torch.where(inside, kv[0, steps.clamp(max=length - 1)], 0))

    def _continue(self, kv_cache, kv, positions, offset, lengths):
        """Stores keys and values; returns those to attend to, and the mask (B or 1, 1, L, keys) or None."""
        length = kv.shape[1]
        if lengths is None:
            kv_cache[:, offset : offset + length] = kv
            if offset == 0:
                return kv, None
            keys = kv_cache[:, : offset + length]
            if length == 1:
                return keys.to(kv.dtype), None
        else:
            rows = torch.arange(kv.shape[0], device=kv.device).unsqueeze(1)
            kv_cache[rows, positions] = kv.to(kv_cache.dtype)
            keys = kv_cache
        reach = positions if self.causal else positions[:, -1:].expand(-1, length)
        key_positions = torch.arange(keys.shape[1], device=kv.device)
        return keys.to(kv.dtype), (key_positions <= reach.unsqueeze(-1)).unsqueeze(1)
