"""`fuse` gives attention modules of torch, timm and transformers our kernels, `unfuse` takes them back."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sparseprop import fuse, plan_fusion, swap_modules, to_dense, unfuse
from sparseprop.nn.attention import NativeAttention, computes_attention
from sparseprop.train._torchvision import import_timm, import_torchvision_models


class SelfAttention(nn.MultiheadAttention):
    """Of one input, with the padding at the end of the second sentence masked."""

    def __init__(self, need_weights: bool = False) -> None:
        super().__init__(32, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x):
        padding = torch.arange(x.shape[1]) >= torch.tensor([[9], [6]])
        return super().forward(x, x, x, key_padding_mask=padding, need_weights=self.need_weights)[0]


def timm_block():
    return import_timm().models.vision_transformer.Block(32, 2)


def swin():
    return import_timm().models.swin_transformer.SwinTransformerBlock(32, (8, 8), num_heads=2, window_size=4)


class Bert(nn.Module):
    """A layer of BERT and what masks the padding of its second sentence."""

    def __init__(self):
        super().__init__()
        import_torchvision_models()
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.bert = BertModel(BertConfig(vocab_size=50, **sizes, **no_dropout))

    def forward(self, x):
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1, 6:] = 0
        return self.bert(inputs_embeds=x, attention_mask=mask).last_hidden_state


def encoder_layer():
    return nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)


# how to make it, an input's shape, calls of our kernels in training
MODULES = {
    "torch": (SelfAttention, (2, 9, 32), 1),
    "torch with weights": (lambda: SelfAttention(need_weights=True), (2, 9, 32), 0),
    "torch encoder layer": (encoder_layer, (2, 9, 32), 1),
    "timm block": (timm_block, (2, 9, 32), 1),
    "timm swin": (swin, (2, 8, 8, 32), 0),  # its bias is learnt
    "transformers bert": (Bert, (2, 9, 32), 2),
}


def outputs(model, x):
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.sin().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("case", MODULES)
def test_outputs_and_gradients_stay_the_same(case, used):
    make, shape, calls = MODULES[case]
    model, x = make(), torch.randn(shape)
    fused = fuse(model, inplace=False)
    for one, other in zip(outputs(fused, x), outputs(model, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert len(used) == calls
    model.eval(), fused.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", MODULES)
def test_everything_but_the_class_stays(case):
    model = MODULES[case][0]()
    fused = fuse(model, inplace=False)
    ours = [name for name, module in fused.named_modules() if isinstance(module, NativeAttention)]
    assert ours
    assert ours == [plan.name for plan in plan_fusion(model) if plan.attention]
    assert not plan_fusion(fused)
    types = {name: type(module) for name, module in model.named_modules()}
    assert all(isinstance(module, types[name]) for name, module in fused.named_modules())
    assert fused.state_dict().keys() == model.state_dict().keys()
    assert {name: type(module) for name, module in unfuse(fused).named_modules()} == types


def test_copies_and_pickles_are_fused(used):
    fused, x = fuse(timm_block()), torch.randn(2, 9, 32)
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(again(x), fused(x))
        assert type(again.attn) is type(fused.attn)
    assert len(used) == 4


def test_swapping_before_and_after_and_back(used):
    model, x = timm_block(), torch.randn(2, 9, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand(parameter.shape) > 0.8)
    before = fuse(swap_modules(copy.deepcopy(model), min_sparsity=0.5))
    after = swap_modules(fuse(copy.deepcopy(model)), min_sparsity=0.5)
    for swapped in (before, after):
        torch.testing.assert_close(swapped(x), model(x), rtol=1e-4, atol=1e-5)
        assert type(to_dense(swapped).attn) is type(model.attn)
    assert len(used) == 2


def test_hooks_are_called():
    fused, seen = fuse(timm_block()), []
    fused.attn.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    fused.attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    fused(torch.randn(2, 9, 32))
    assert seen == [(2, 9, 96), (2, 9, 32)]


def test_compiled_and_exported_code_has_torchs_attention(used):
    model, x = timm_block().eval(), torch.randn(2, 9, 32)
    fused = fuse(model, inplace=False)
    torch.testing.assert_close(torch.compile(fused, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.export.export(fused, (x,)).module()(x), model(x), rtol=1e-4, atol=1e-5)
    assert not used


def test_checkpointing_and_functional_calls(used):
    model, x = fuse(timm_block()), torch.randn(2, 9, 32)
    plain = outputs(model, x)
    for one, other in zip(
        plain, outputs_of(lambda x: checkpoint(model, x, use_reentrant=False), model, x), strict=True
    ):
        torch.testing.assert_close(one, other)
    called = torch.func.functional_call(model, dict(model.named_parameters()), (x,))
    torch.testing.assert_close(called.detach(), plain[0])
    assert len(used) == 4


def outputs_of(function, model, x):
    wrapper = nn.Module()
    wrapper.model, wrapper.forward = model, function
    return outputs(wrapper, x)


def test_a_forward_of_its_own_is_left_alone():
    attention = nn.MultiheadAttention(16, 1)
    assert computes_attention(attention)
    attention.forward = lambda *args: None
    assert not computes_attention(attention)
    assert not plan_fusion(attention)


class CheckpointsInside(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.qkv, self.reentrant = nn.Linear(32, 96), reentrant

    def forward(self, x):
        q, k, v = self.qkv(x).view(2, 10, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        core = functional.scaled_dot_product_attention
        return checkpoint(core, q, k, v, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_within_a_forward_are_computed_again_alike(reentrant):
    model, x = CheckpointsInside(reentrant), torch.randn(2, 10, 32)
    wanted = outputs(model, x)
    for ours, usual in zip(outputs(fuse(model), x), wanted, strict=True):
        torch.testing.assert_close(ours, usual, rtol=1e-4, atol=1e-5)
