"""From traces to bits: against enumeration, closed forms and the loss of really rounded nets."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from nets import normal
from test_real_net import FILES
from torch import Tensor, nn

import hessfn as hf
from hessfn import problems
from hessfn.quantization.bits import given_not_negative

WEIGHTS = {"a": normal(3, 5), "b": normal(4), "c": {"d": normal(2, 3, 2, seed=1), "e": normal(3, seed=2).abs()}}


def table(
    traces: Mapping[str, float],
    numel: Mapping[str, int],
    errors: Mapping[str, float] | None = None,
    activations: Mapping[str, float] | None = None,
    activation_numel: Mapping[str, int] | None = None,
) -> hf.Sensitivities:
    def estimate(means: Mapping[str, float]) -> hf.Estimate[dict[str, Tensor]]:
        stderr = {layer: torch.tensor((errors or {}).get(layer, 0.0)).double() for layer in means}
        return hf.Estimate({layer: torch.tensor(x).double() for layer, x in means.items()}, stderr, torch.tensor(50))

    flowing = activation_numel or dict.fromkeys(traces, 1)
    return hf.Sensitivities(
        estimate(traces), estimate(activations or dict.fromkeys(traces, 0.0)), dict(numel), dict(flowing)
    )


# The quantiser


def by_hand(x: np.ndarray, bits: int, num_scales: int) -> np.ndarray:
    """One scale: nearest of the levels, for every scale; the best of them all."""
    top = 2**bits - 1 if (x >= 0).all() else 2 ** (bits - 1) - 1
    steps = np.arange(0 if (x >= 0).all() else -top, top + 1)
    best, least = x, np.inf
    for number in range(num_scales, 0, -1):
        levels = steps * (np.abs(x).max() / top * number / num_scales)
        found = levels[np.abs(x[:, None] - levels).argmin(1)]
        if (error := ((found - x) ** 2).sum()) < least:
            best, least = found, error
    return best


@pytest.mark.parametrize("num_scales", [1, 16])
@pytest.mark.parametrize("bits", [2, 3, 5])
def test_entries_are_rounded_to_the_nearest_level_of_the_best_scale(bits: int, num_scales: int) -> None:
    whole = hf.quantized(WEIGHTS, bits, per_channel=False, num_scales=num_scales)
    for found, x in zip(hf.tree.leaves(whole), hf.tree.leaves(WEIGHTS), strict=True):
        expected = by_hand(x.numpy().reshape(-1), bits, num_scales)
        assert np.allclose(found.numpy().reshape(-1), expected, rtol=1e-12, atol=1e-14)
    channels = hf.quantized(WEIGHTS["a"], bits, num_scales=num_scales)
    for found, x in zip(channels, WEIGHTS["a"], strict=True):
        if (x >= 0).any() and (x < 0).any():
            assert np.allclose(found.numpy(), by_hand(x.numpy(), bits, num_scales), rtol=1e-12, atol=1e-14)
    assert len(whole["c"]["d"].unique()) <= 2**bits - 1 and len(whole["c"]["e"].unique()) <= 2**bits


def test_bits_by_layer_leave_the_rest_as_it_is() -> None:
    params = {"0.weight": normal(3, 3), "0.bias": normal(3), "1.weight": normal(2, 3)}
    found = hf.quantized(params, {"0": 3, "1.weight": 2})
    assert torch.equal(found["0.weight"], hf.quantized(params["0.weight"], 3))
    assert torch.equal(found["1.weight"], hf.quantized(params["1.weight"], 2))
    assert torch.equal(found["0.bias"], params["0.bias"]) and found["0.bias"] is not params["0.bias"]


def test_levels_at_the_edge() -> None:
    assert torch.equal(hf.quantized(torch.zeros(2, 3), 2), torch.zeros(2, 3))
    assert hf.quantized(torch.zeros(0, 3), 2).shape == (0, 3)
    assert torch.equal(hf.quantized(torch.tensor([-2.0, 0.0, 2.0]), 2), torch.tensor([-2.0, 0.0, 2.0]))
    assert hf.quantized(torch.tensor([1.0, torch.nan]), 4).isnan().any()
    half = normal(4, 4).bfloat16()
    assert hf.quantized(half, 8).dtype == torch.bfloat16
    x = normal(50, seed=3)
    errors = [float((hf.quantized(x, bits) - x).norm()) for bits in (2, 4, 8, 16, 24)]
    assert all(b < a / 2 for a, b in itertools.pairwise(errors)) and errors[-1] < 1e-6
    pairs = normal(4, 5, 2, seed=6)
    turned = hf.quantized(torch.view_as_complex(pairs), 4)
    assert torch.equal(torch.view_as_real(turned), hf.quantized(pairs, 4))
    whole = hf.quantized(torch.view_as_complex(pairs[0]), 4)
    assert torch.equal(torch.view_as_real(whole), hf.quantized(pairs[0], 4, per_channel=False))
    complex_one = {"0.weight": torch.view_as_complex(pairs)}
    both = [hf.expected_rise(table({"0": 8.0}, {"0": 40}), x, 4).mean["0"] for x in (complex_one, {"0": pairs})]
    assert torch.allclose(*both, rtol=1e-12) and both[0] > 0
    assert hf.quantized({"a": None, "b": pairs}, np.int64(4))["a"] is None


def test_rounding_runs_under_vmap_and_has_the_derivative_of_its_formula() -> None:
    several = normal(3, 4, 5, seed=4)
    mapped = torch.func.vmap(lambda w: hf.quantized(w, 3))(several)
    assert torch.equal(mapped, torch.stack([hf.quantized(w, 3) for w in several]))
    x = normal(6, seed=5)
    slope = torch.func.grad(lambda w: hf.quantized(w, 3).square().sum())(x)
    for i in range(6):
        step = torch.zeros(6).double().index_fill(0, torch.tensor(i), 1e-6)
        ends = [float(hf.quantized(x + sign * step, 3).square().sum()) for sign in (1, -1)]
        assert abs((ends[0] - ends[1]) / 2e-6 - slope[i]) <= 1e-6 * slope.abs().max()


# The rise that is expected


def test_the_rise_is_exact_where_the_hessian_is_the_same_in_every_direction() -> None:
    """Of least squares with orthogonal inputs, at the minimum, any error costs its square."""
    torch.manual_seed(0)
    x = torch.linalg.qr(normal(6, 6))[0] * 3
    model = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
    loss, params = hf.functionalize(model, nn.MSELoss())
    batch = x, model(x).detach()
    exact = hf.dense(hf.hvp(loss, params, batch), params).trace()
    found = hf.expected_rise(table({"0": float(exact)}, {"0": 24}, {"0": 0.5}), params, 3)
    measured = loss(hf.quantized(params, 3), batch) - loss(params, batch)
    assert measured > 1e-3 and torch.allclose(found.mean["0"], measured, rtol=1e-12)
    assert torch.allclose(found.stderr["0"], measured * 0.5 / exact, rtol=1e-12)


def test_the_rise_is_right_on_average_where_errors_have_no_direction() -> None:
    """Of least squares with any inputs, over a hundred draws of the weights."""
    x = normal(40, 8, seed=1) * torch.logspace(0, -1, 8).double()
    numbers = torch.Generator().manual_seed(0)
    measured, expected = [], []
    for _ in range(100):
        w = torch.randn(1, 8, generator=numbers, dtype=torch.float64)
        trace = float(2 * x.square().sum() / 40)
        found = hf.expected_rise(table({"0": trace}, {"0": 8}), {"0.weight": w}, {"0": 4}).mean["0"]
        measured.append(float(((hf.quantized(w, 4) - w) @ x.T).square().mean()))
        expected.append(float(found))
    difference = np.array(measured) - np.array(expected)
    assert abs(difference.mean()) <= 4 * difference.std() / 10
    assert difference.std() / 10 <= 0.1 * np.mean(expected)


def test_rounding_what_enters_a_layer_is_in_the_rise() -> None:
    turn = torch.linalg.qr(normal(5, 5, seed=2))[0]
    model = nn.Sequential(nn.Linear(5, 5, bias=False)).double()
    model[0].weight.data = 2 * turn
    x = normal(7, 5, seed=3)
    target = model(x).detach()
    trace = 2 / 5 * 4 * 5  # of one sample: 2 / d W'W
    params = {"0.weight": model[0].weight.detach()}
    given = table({"0": 0.0}, {"0": 25}, activations={"0": trace}, activation_numel={"0": 5})
    found = hf.expected_rise(given, params, 4, activations={"0": x})
    rounded = hf.quantized(x, 4, per_channel=False)
    assert torch.allclose(found.mean["0"], nn.functional.mse_loss(model(rounded), target).detach(), rtol=1e-12)
    traces = hf.activation_traces(model, nn.MSELoss(), [(x, target)], "0", 3).mean["0"]
    assert torch.allclose(traces, torch.tensor(trace).double())


# The choice


def enumerated(costs: list[dict[int, float]], numel: list[int], size: float) -> float:
    return min(
        sum(cost[bits] for cost, bits in zip(costs, chosen, strict=True))
        for chosen in itertools.product(*costs)
        if sum(n * bits for n, bits in zip(numel, chosen, strict=True)) <= size
    )


@pytest.mark.parametrize("seed", range(12))
def test_no_other_choice_of_that_size_is_better(seed: int) -> None:
    """Against all there are; sizes and traces lie up to ten decades apart."""
    random = np.random.default_rng(seed)
    count, choices = int(random.integers(1, 7)), sorted(random.choice([2, 3, 4, 6, 8], size=3, replace=False).tolist())
    layers = [f"layer{i}" for i in range(count)]
    numel = {layer: int(10 ** random.uniform(0, random.choice([2, 7]))) for layer in layers}
    traces = {layer: float(10 ** random.uniform(-random.choice([1, 10]), 2)) for layer in layers}
    params = {f"{layer}.weight": normal(min(numel[layer], 30), seed=i) for i, layer in enumerate(layers)}
    size = int(random.uniform(choices[0], choices[-1]) * sum(numel.values()))
    plain = [{bits: traces[layer] * (2 / (2**bits - 2)) ** 2 / 24 for bits in choices} for layer in layers]
    real = [
        {bits: traces[x] / w.numel() * float((hf.quantized(w, bits) - w).square().sum()) / 2 for bits in choices}
        for x, w in zip(layers, params.values(), strict=True)
    ]
    small = {layer: params[f"{layer}.weight"].numel() for layer in layers}
    share = sum(small.values()) * size / sum(numel.values())
    for costs, own, options in (
        (plain, numel, {"total_bits": size}),
        (real, small, {"mean_bits": size / sum(numel.values()), "params": params}),
    ):
        found = hf.allocate_bits(table(traces, own), choices=choices, **options)
        limit = size if own is numel else share
        assert sum(own[layer] * bits for layer, bits in found.items()) <= limit
        value = sum(cost[found[layer]] for layer, cost in zip(layers, costs, strict=True))
        assert value <= enumerated(costs, list(own.values()), limit) * (1 + 1e-6)


def test_a_choice_that_takes_one_bit_too_many_is_none() -> None:
    """Of ten billion bits one is below the tolerance of the solver."""
    for seed in range(40):
        random = np.random.default_rng(seed)
        layers = [f"layer{i}" for i in range(int(random.integers(2, 6)))]
        numel = {layer: int(10 ** random.uniform(0, 11)) for layer in layers}
        traces = {layer: float(10 ** random.uniform(-3, 3)) for layer in layers}
        costs = [{bits: traces[layer] * (2 / (2**bits - 2)) ** 2 / 24 for bits in (2, 3, 4, 8)} for layer in layers]
        some = sum(n * int(random.choice([2, 3, 4, 8])) for n in numel.values())
        size = max(2 * sum(numel.values()), some - 1)
        found = hf.allocate_bits(table(traces, numel), choices=(2, 3, 4, 8), total_bits=size)
        assert sum(numel[layer] * bits for layer, bits in found.items()) <= size
        value = sum(cost[found[layer]] for layer, cost in zip(layers, costs, strict=True))
        assert value <= enumerated(costs, list(numel.values()), size) * (1 + 1e-6)


def test_without_weights_an_error_is_uniform_between_two_levels() -> None:
    """From 2 to 3 bits a layer gains 1 - 1/9, from 3 to 4 1/9 - 1/49: as much where its trace is 9.8 times as large."""
    numel = {"a": 1, "b": 1}
    for ratio, expected in ((9.7, {"a": 3, "b": 3}), (9.9, {"a": 2, "b": 4})):
        assert hf.allocate_bits(table({"a": 1.0, "b": ratio}, numel), choices=(2, 3, 4), total_bits=6) == expected


def test_a_trace_of_noise_counts_as_what_it_may_be() -> None:
    for mean, stderr in ((3.0, 1.0), (0.1, 1.0), (0.0, 2.0), (-0.5, 1.0), (-4.0, 0.5), (50.0, 1.0)):
        exact = scipy.stats.truncnorm(-mean / stderr, np.inf, mean, stderr).mean()
        assert given_not_negative(mean, stderr) == pytest.approx(exact, rel=1e-9)
    assert given_not_negative(-2.0, 0.0) == 0 and given_not_negative(2.0, 0.0) == 2
    values = [given_not_negative(mean, 1.0) for mean in (-1e9, -1e3, -10, -1, 0, 1, 10, 1e9)]
    assert all(a <= b for a, b in itertools.pairwise(values)) and min(values) >= 0


def test_the_sign_of_noise_decides_nothing() -> None:
    numel = {"a": 10, "b": 10, "c": 10}
    errors = {"a": 1.0, "b": 1.0, "c": 0.1}
    for a, b in ((-0.3, 0.2), (0.2, -0.3), (-0.2, -0.1)):
        noise = table({"a": a, "b": b, "c": 40.0}, numel, errors)
        assert hf.allocate_bits(noise, mean_bits=16 / 3) == {"a": 4, "b": 4, "c": 8}
    # What is negative beyond its error has the fewest bits, and what it would gain by errors buys none for others.
    negative = table({"a": -50.0, "b": 1.0, "c": 40.0}, numel, errors)
    alone = table({"b": 1.0, "c": 40.0}, {"b": 10, "c": 10}, errors)
    assert hf.allocate_bits(negative, total_bits=140) == {"a": 2, **hf.allocate_bits(alone, total_bits=120)}
    found = hf.expected_rise(negative, {f"{x}.weight": normal(10) for x in numel}, 2)
    assert found.mean["a"] < 0 < found.mean["b"]  # the estimate itself is said as it is


def test_noise_of_activations_adds_to_both_alike() -> None:
    params = {f"{x}.weight": normal(4, 5, seed=i) for i, x in enumerate("ab")}
    params["b.weight"] = params["a.weight"].clone()
    entering = dict.fromkeys("ab", normal(6, 5, seed=9))
    numel = {"a": 20, "b": 20}
    for sign in (1, -1):
        given = table(
            {"a": 5.0, "b": 5.0},
            numel,
            dict.fromkeys("ab", 0.5),
            {"a": 0.1 * sign, "b": -0.1 * sign},
            dict.fromkeys("ab", 5),
        )
        assert hf.allocate_bits(given, mean_bits=4, params=params, activations=entering) == {"a": 4, "b": 4}


def test_layers_that_share_a_weight_have_one_number_of_bits_and_are_stored_once() -> None:
    w, v = normal(4, 5), normal(4, 5, seed=1)
    given = table({"a": 100.0, "b": 1.0, "c": 100.0}, dict.fromkeys("abc", 20))
    shared = {"a.weight": w, "b.weight": v, "c.weight": w}
    assert hf.allocate_bits(given, total_bits=200, params=shared) == {"a": 8, "b": 2, "c": 8}
    once = table({"a": 100.0, "b": 150.0, "c": 100.0}, dict.fromkeys("abc", 20))  # the trace of both uses, twice told
    assert hf.allocate_bits(once, total_bits=240, params=shared) == {"a": 4, "b": 8, "c": 4}
    apart = {**shared, "c.weight": w.clone()}
    assert hf.allocate_bits(given, total_bits=200, params=apart) == {"a": 4, "b": 2, "c": 4}
    with pytest.raises(hf.HessfnError, match="a and c share their weight"):
        hf.allocate_bits(given, total_bits=200, params=shared, fixed={"a": 4, "c": 8})


def test_fixed_layers_count_in_the_size() -> None:
    given = table({"a": 1.0, "b": 1.0, "c": 1.0}, dict.fromkeys("abc", 10))
    assert hf.allocate_bits(given, total_bits=120, fixed={"a": 8}, choices=(2, 4)) == {"a": 8, "b": 2, "c": 2}
    with pytest.raises(hf.HessfnError, match="total_bits=110 .* at least 120"):
        hf.allocate_bits(given, total_bits=110, fixed={"a": 8}, choices=(2, 4))


def test_what_cannot_be_is_named() -> None:
    given = table({"a": 1.0, "b": 2.0}, {"a": 10, "b": 30})
    params = {"a.weight": normal(10), "b.weight": normal(30)}
    for options, words in (
        ({"mean_bits": 1.9}, "mean_bits=1.9 .* at least 2$"),
        ({"total_bits": 79}, "total_bits=79 .* at least 80$"),
        ({"mean_bits": 4, "total_bits": 160}, "one of mean_bits"),
        ({}, "one of mean_bits"),
        ({"mean_bits": float("nan")}, "mean_bits: nan is no finite number"),
        ({"mean_bits": "4"}, "mean_bits: '4'"),
        ({"mean_bits": 4, "choices": ()}, "choices is empty"),
        ({"mean_bits": 4, "choices": (1, 2)}, "bits=1 must be between 2 and 32"),
        ({"mean_bits": 4, "choices": (2.5,)}, "bits: 2.5 is no whole number"),
        ({"mean_bits": 4, "fixed": {"z": 4}}, "fixed: 'z' is no layer"),
        ({"mean_bits": 4, "params": {"a.weight": normal(10)}}, "'b' is neither a leaf .*remove_duplicate"),
        ({"mean_bits": 4, "params": {**params, "b.weight": normal(3)}}, "'b' has 3 entries, its trace is that of 30"),
        ({"mean_bits": 4, "params": {**params, "b.weight": normal(30) * torch.inf}}, "'b' is not finite"),
        ({"mean_bits": 4, "activations": params}, "no use without params"),
        ({"mean_bits": 4, "params": params, "activations": {"a": normal(2, 1)}}, "what enters 'b' is missing"),
        ({"mean_bits": 4, "params": params, "activations": {"a": normal(2, 3)}}, "'a' has 3 entries"),
    ):
        with pytest.raises(hf.HessfnError, match=words):
            hf.allocate_bits(given, **options)
    with pytest.raises(hf.HessfnError, match="sensitivities is a dict of 2"):
        hf.allocate_bits({"a": 1, "b": 2}, mean_bits=4)  # type: ignore[arg-type]
    with pytest.raises(hf.HessfnError, match="num_probes=2 or more"):
        hf.allocate_bits(table({"a": 1.0}, {"a": 3}, {"a": float("inf")}), mean_bits=4)
    for model in (nn.Linear(3, 3), 7):
        with pytest.raises(hf.HessfnError, match=r"params is .*, not a t"):
            hf.allocate_bits(given, mean_bits=4, params=model)
    with pytest.raises(hf.HessfnError, match="'z' is no layer of the sensitivities"):
        hf.expected_rise(given, params, {"z": 4})
    for arguments, words in (((params, 1), "bits=1"), ((params, {"z": 2}), "'z' is neither"), ((3, 2), "params is 3")):
        with pytest.raises(hf.HessfnError, match=words):
            hf.quantized(*arguments)
    with pytest.raises(hf.HessfnError, match="num_scales=0"):
        hf.quantized(params, 2, num_scales=0)
    assert hf.allocate_bits(given, mean_bits=30) == {"a": 8, "b": 8}


def test_many_layers_take_little_time_and_fill_the_size() -> None:
    random = np.random.default_rng(0)
    numel = {str(i): int(10 ** random.uniform(2, 7)) for i in range(60)}
    given = table({x: float(10 ** random.uniform(-2, 3)) for x in numel}, numel)
    found = hf.allocate_bits(given, choices=range(2, 9), mean_bits=4)
    assert 0.995 * 4 <= sum(numel[x] * bits for x, bits in found.items()) / sum(numel.values()) <= 4


# A real net


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not all(map(Path.is_file, FILES.values())), reason="no weights and images beside the repository")
def test_a_rounded_resnet20_loses_less_by_the_choice_than_by_uniform_bits() -> None:
    """Of the same size. The order of layers is near the expected one, the size of the rise is some times as large.

    Along the very errors, by one gradient and one product for each layer, both are nearer.
    """
    model, criterion, batches = problems.cifar10_resnet20(**FILES, num_images=200, batch_size=100)
    given = hf.sensitivities(model, criterion, batches, num_probes=24)
    loss, params = hf.functionalize(model, criterion)
    layers = list(given.weight_numel)

    def value(at: dict[str, Tensor]) -> float:
        with torch.no_grad():
            return float(sum(loss(at, batch).double() for batch in batches) / len(batches))

    start = value(params)
    copied = [layer for layer in layers if "identity" in layer]  # weights of zeros and ones: no error, whatever a trace
    for per_channel, share in ((True, 1.0), (False, 0.6)):
        chosen = hf.allocate_bits(given, mean_bits=4, params=params, per_channel=per_channel)
        size = sum(given.weight_numel[layer] * bits for layer, bits in chosen.items())
        assert size <= 4 * sum(given.weight_numel.values())
        assert {chosen[layer] for layer in copied} == {2}
        rises = [
            value(hf.quantized(params, bits, per_channel=per_channel)) - start
            for bits in (chosen, dict.fromkeys(layers, 4))
        ]
        assert 0 < rises[0] < share * rises[1]
    expected = hf.expected_rise(given, params, 4).mean
    slopes = [torch.func.grad(loss)(params, batch) for batch in batches]
    slope = hf.tree.scale(1 / len(slopes), functools.reduce(hf.tree.add, slopes))
    matvec = hf.mean_hvp(loss, params, batches)
    rows = []
    for layer in (layer for layer in layers if layer not in copied):
        rounded = hf.quantized(params, {layer: 4})
        error = hf.tree.add(rounded, params, -1.0)
        along = hf.tree.dot(slope, error) + hf.tree.dot(error, matvec(error)) / 2
        rows.append((value(rounded) - start, float(expected[layer]), float(along)))
    measured, by_trace, by_error = np.array(rows).T
    assert scipy.stats.spearmanr(measured, by_trace).statistic > 0.4
    assert scipy.stats.spearmanr(measured, by_error).statistic > 0.75
    assert by_trace.sum() < measured.sum() < 6 * by_trace.sum()
    assert 0.5 < by_error.sum() / measured.sum() < 1.5
