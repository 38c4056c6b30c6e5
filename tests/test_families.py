"""Hessians of the families of nets in torchvision and pytorchcv, against double backward: activations through hooks.

A sample of small ones runs with the suite; ``python tests/test_families.py`` runs one of every family, or those that
are named, and says how far off each is.
"""

import sys
import time
import warnings
from collections import Counter

import pytest
import torch
from nets import classes, normal
from torch import nn

import hessfn as hf
from hessfn.core import tree

# The smallest of each family that is made for CIFAR-10.
PYTORCHCV = [
    "nin_cifar10",
    "resnet20_cifar10",
    "resnet164bn_cifar10",
    "preresnet20_cifar10",
    "preresnet164bn_cifar10",
    "resnext20_16x4d_cifar10",
    "seresnet20_cifar10",
    "seresnet164bn_cifar10",
    "sepreresnet20_cifar10",
    "sepreresnet164bn_cifar10",
    "pyramidnet110_a48_cifar10",
    "pyramidnet164_a270_bn_cifar10",
    "densenet40_k12_cifar10",
    "densenet40_k12_bc_cifar10",
    "xdensenet40_2_k24_bc_cifar10",
    "wrn16_10_cifar10",
    "wrn20_10_1bit_cifar10",
    "wrn20_10_32bit_cifar10",
    "ror3_56_cifar10",
    "rir_cifar10",
    "msdnet22_cifar10",
    "resdropresnet20_cifar10",
    "shakeshakeresnet20_2x16d_cifar10",
    "shakedropresnet20_cifar10",
    "fractalnet_cifar10",
    "diaresnet20_cifar10",
    "diaresnet164bn_cifar10",
    "diapreresnet20_cifar10",
    "diapreresnet164bn_cifar10",
]
# And of torchvision's, which has none that are made for it: with small images.
TORCHVISION = {
    "alexnet": 63,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 32,
    "inception_v3": 299,
    "maxvit_t": 224,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "resnet50": 32,
    "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_0": 32,
    "swin_t": 32,
    "swin_v2_t": 32,
    "vgg11": 32,
    "vgg11_bn": 32,
    "vit_b_32": 224,
    "wide_resnet50_2": 32,
}
# Held against differences of gradients: its weights are binary by an autograd.Function that torch.func refuses, so that
# products are those of double backward.
ONE_BIT = "wrn20_10_1bit_cifar10"
# Activations without a double backward, by their definitions.
ELEMENTARY = {
    nn.Hardsigmoid: lambda x: (x / 6 + 0.5).clamp(0, 1),
    nn.Hardswish: lambda x: x * (x / 6 + 0.5).clamp(0, 1),
}
ALL = [("pytorchcv.model_provider", name, 32) for name in PYTORCHCV]
ALL += [("torchvision.models", name, size) for name, size in TORCHVISION.items()]
SAMPLE = [
    "resnet20_cifar10",
    "preresnet20_cifar10",
    "densenet40_k12_cifar10",
    "seresnet20_cifar10",
    "shakeshakeresnet20_2x16d_cifar10",
    "squeezenet1_0",
    "shufflenet_v2_x0_5",
    "mobilenet_v2",
    "mnasnet0_5",
]


def criterion(outputs, labels):
    """Cross-entropy; of a net with several outputs the mean."""
    several = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    # Of the size of one: a random net is as sure as its logits are large, and then its Hessian is all rounding.
    return torch.stack([nn.functional.cross_entropy(x / (1 + x.detach().abs().max()), labels) for x in several]).mean()


def with_shifts(model, inputs):
    """Outputs of the model itself, every layer seeing its input plus a leaf of its own; and those leaves, by call."""
    leaves, handles, calls = {}, [], Counter()

    def shift(name):
        def hook(module, args):
            calls[name] += 1
            leaf = leaves[name, calls[name]] = torch.zeros_like(args[0], requires_grad=True)
            return args[0] + leaf, *args[1:]

        return hook

    try:
        for name, module in model.named_modules():
            if is_layer(name, module):
                handles.append(module.register_forward_pre_hook(shift(name)))
        return model(inputs), {f"{n}#{i}" if calls[n] > 1 else n: leaf for (n, i), leaf in leaves.items()}
    finally:
        for handle in handles:
            handle.remove()


def build(zoo, name, size):
    """A random net whose running statistics are those of random images: else deep ones overflow."""
    models = pytest.importorskip(zoo)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = models.get_model(name).double()
        for p in model.parameters():
            if not p.any():  # heads and biases, which would hide what is behind them
                p.normal_(std=0.02)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for module in norms:
            module.momentum = 1.0
        if norms:
            model(normal(4, 3, size, size, seed=5))
        return model.eval()


def is_layer(name, module):
    """But for what is there and not called: layers of attention, and the outputs that only training has."""
    called = not name.endswith(("out_proj", "attn.qkv", "attn.proj")) and not name.lower().startswith("aux")
    return called and isinstance(module, (nn.Conv2d, nn.Linear))


def error(zoo, name, size):
    """Of a product with all layers at once, relative; and the number of layers."""
    model, batch = build(zoo, name, size), (normal(2, 3, size, size), classes(2, 10))
    loss, shifts = hf.activation_loss(model, criterion, batch, is_layer)
    assert next(iter(shifts.values())).shape == batch[0].shape
    v = hf.gaussian(shifts, 1)[0]
    hard = [module for module in model.modules() if type(module) in ELEMENTARY]
    # Forward mode where it can be: a trace takes longer.
    product = hf.hvp(loss, shifts, mode="double_backward" if name == ONE_BIT else "traced" if hard else "forward")(v)
    if name == ONE_BIT:
        exact = hf.hvp(loss, shifts, mode="difference")(v)
        return float(tree.norm(tree.add(product, exact, -1.0)) / tree.norm(exact)), len(shifts)
    for module in hard:
        module.forward = ELEMENTARY[type(module)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        outputs, leaves = with_shifts(model, batch[0])
        assert list(leaves) == list(shifts)
        value, options = criterion(outputs, batch[1]), {"materialize_grads": True}
        gradient = torch.autograd.grad(value, list(leaves.values()), create_graph=True, **options)
        pairs = [(g, v[name]) for name, g in zip(leaves, gradient, strict=True) if g.requires_grad]  # else 0
        outputs, directions = zip(*pairs, strict=True)
        exact = torch.autograd.grad(outputs, list(leaves.values()), directions, **options)
    exact = dict(zip(leaves, exact, strict=True))
    return float(tree.norm(tree.add(product, exact, -1.0)) / tree.norm(exact)), len(shifts)


def linearized_error(zoo, name, size):
    """Of a linearized product with the Hessian of the parameters, relative."""
    model, batch = build(zoo, name, size), (normal(2, 3, size, size), classes(2, 10))
    loss, params = hf.functionalize(model, criterion)
    v = hf.gaussian(params, 1)[0]
    product = hf.linearized_hvp(loss, params, batch)(v)
    for module in model.modules():
        if type(module) in ELEMENTARY:
            module.forward = ELEMENTARY[type(module)]
    loss, _ = hf.functionalize(model, criterion)
    exact = hf.hvp(loss, params, batch, mode="double_backward")(v)
    if not tree.norm(exact).isfinite():  # torch's double backward of a norm that is zero
        exact = hf.hvp(loss, params, batch, mode="forward")(v)
    return float(tree.norm(tree.add(product, exact, -1.0)) / tree.norm(exact))


@pytest.mark.parametrize(("zoo", "name", "size"), [entry for entry in ALL if entry[1] in SAMPLE])
def test_all_layers_at_once_are_those_of_double_backward_through_hooks(zoo, name, size):
    assert error(zoo, name, size)[0] <= 1e-10


def main(names):
    for zoo, name, size in ALL:
        if names and name not in names:
            continue
        start = time.perf_counter()
        try:
            relative, layers = error(zoo, name, size)
            of_parameters = "not" if name == ONE_BIT else f"off by {linearized_error(zoo, name, size):.0e}"
            found = f"{layers:4} layers, {size:3} pixels: off by {relative:.0e}; linearized: {of_parameters}"
        except Exception as failure:
            found = f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}"
        print(f"{name:40}{found}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
