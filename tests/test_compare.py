from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import Parsed
from reports import N, changed, data, report_of, trained, truth, written

from hessfn.core.errors import InvalidInput
from hessfn.reporting.compare import compare, summary
from hessfn.reporting.contrast import compared
from hessfn.reporting.differences import Measured, Shared, difference
from hessfn.reporting.schema import parsed
from hessfn.reporting.side import Side

THETA = trained()
STEP = np.array([math.sin(7 * i) for i in range(N)])
BEFORE, AFTER = truth(THETA), truth(THETA + 0.01 * THETA.new_tensor(STEP))
REPORT = report_of(BEFORE)


def of(*results: dict[str, Any]) -> dict[str, Any]:
    return compared([Side(f"folder {i}", parsed(result)) for i, result in enumerate(results)])


def test_a_report_does_not_differ_from_itself() -> None:
    result = of(REPORT, REPORT)
    numbers = [result[name] for name in ("loss", "sharpness", "trace", "smallest", "share_of_squares")]
    numbers += [*result["eigenvalues"], *result["layers"].values(), *result["activations"].values()]
    assert len(numbers) == 5 + 3 + 4 + 2
    assert not any(by.differs or by.generalizes for by in numbers)
    assert all(by.mean == 0 for by in numbers)


def test_a_tenth_of_the_old_error_is_seen_by_paired_probes() -> None:
    """The Hessians are dense: the true difference is known, and so is what the two traces err by."""
    later = truth(THETA + 0.003 * THETA.new_tensor(STEP))
    a, b = (report_of(net, num_probes=30) for net in (BEFORE, later))
    exact, by = later.trace - BEFORE.trace, of(a, b)["trace"]
    old = math.hypot(a["trace"]["stderr"], b["trace"]["stderr"])
    assert abs(exact) < old / 10
    assert by.paired and by.differs
    assert abs(by.mean - exact) <= 4 * by.stderr < old / 10
    other = of(a, report_of(later, num_probes=30, probe_seed=1))["trace"]
    assert not other.paired and not other.differs


@pytest.mark.slow
@pytest.mark.parametrize("comparisons", [1, 4])
def test_intervals_of_differences_cover(comparisons: int) -> None:
    """Of 400 pairs of reports, each with other probes, 95 % hold the difference; so do those of all layers at once."""
    missed = 0
    for seed in range(400):
        result = of(*(report_of(net, num_probes=20, probe_seed=seed) for net in (BEFORE, AFTER)))
        if comparisons == 1:
            pairs = [(result["trace"], AFTER.trace - BEFORE.trace)]
        else:
            pairs = [(by, AFTER.layers[name] - BEFORE.layers[name]) for name, by in result["layers"].items()]
        shifted = [by.mean - exact for by, exact in pairs]
        missed += any(
            difference(Measured(0.0, by.stderr), Measured(d, 0.0), Shared(), num_probes=20, num_batches=4,
                       comparisons=comparisons).differs
            for d, (by, _) in zip(shifted, pairs, strict=True)
        )  # fmt: skip
    assert 8 <= missed <= 34  # 20, and three standard deviations of a binomial number


def over_draws_of_the_data() -> Iterator[Any]:
    """Two nets of a step of training, and their reports, on forty draws of the data."""
    later = THETA + 0.05 * THETA.new_tensor(STEP)
    for seed in range(1, 41):
        batches = data(num_batches=6, size=8, seed=seed)
        nets = [truth(theta, batches) for theta in (THETA, later)]
        yield nets, *(report_of(net, num_probes=4, fingerprint=str(seed)) for net in nets)


@pytest.mark.slow
def test_what_other_data_would_change_is_known_by_batches() -> None:
    """Over many draws of the data, the standard error of the difference is the spread of the differences."""
    found, stated = [], []
    for nets, a, b in over_draws_of_the_data():
        by = of(a, b)["trace"]
        found.append(nets[1].trace - nets[0].trace)
        stated.append(by.data_stderr)
        alone = math.hypot(a["trace"]["data_stderr"], b["trace"]["data_stderr"])
        assert by.data_stderr < 0.75 * alone
    assert np.mean(np.square(stated)) ** 0.5 == pytest.approx(np.std(found), rel=0.35)


@pytest.mark.slow
def test_losses_are_compared_by_the_same_samples() -> None:
    """What the loss is on these data is known; over draws of the data, its difference spreads as it says."""
    found, stated = [], []
    for nets, a, b in over_draws_of_the_data():
        by = of(a, b)["loss"]
        assert by.mean == pytest.approx(nets[1].losses.mean() - nets[0].losses.mean(), abs=1e-12)
        assert by.differs and by.stderr == 0 and by.bound < 1e-10
        found.append(by.mean)
        stated.append(by.data_stderr)
        assert by.data_stderr < 0.6 * math.hypot(a["loss_data_stderr"], b["loss_data_stderr"])
        other = of(a, changed(b, samples__data="other"))["loss"]
        assert other.data_stderr == pytest.approx(math.hypot(a["loss_data_stderr"], b["loss_data_stderr"]))
    assert np.mean(np.square(stated)) ** 0.5 == pytest.approx(np.std(found), rel=0.35)
    near = of(REPORT, changed(REPORT, loss=REPORT["loss"] * (1 + 1e-15)))["loss"]
    assert not near.differs  # rounding


def test_reports_without_the_losses_of_batches_are_read() -> None:
    old = changed(REPORT, samples__batches__losses=None, loss_data_stderr=None)
    by = of(old, changed(old, loss=1.0))["loss"]
    assert by.differs and by.generalizes is None and math.isnan(by.data_stderr)
    assert "not finite" not in summary(of(old, changed(old, loss=1.0))).splitlines()[4]


def test_samples_are_paired_only_where_they_are_the_same() -> None:
    assert of(REPORT, report_of(AFTER))["shared"] == {"probes": True, "data": True}
    assert of(REPORT, report_of(AFTER, probe_seed=1))["shared"] == {"probes": False, "data": True}
    assert of(REPORT, report_of(AFTER, fingerprint="other"))["shared"] == {"probes": True, "data": False}
    larger = changed(REPORT, **{"layers__0.bias__numel": 7})
    assert of(REPORT, larger)["shared"]["probes"] is False
    unpaired = of(REPORT, report_of(AFTER, probe_seed=1, fingerprint="other"))["trace"]
    assert unpaired.stderr == pytest.approx(math.hypot(*(report_of(net)["trace"]["stderr"] for net in (BEFORE, AFTER))),
                                            rel=0.5)  # fmt: skip
    assert changed(REPORT, samples=None)["samples"] is None
    assert not of(REPORT, changed(REPORT, samples=None))["trace"].paired


def test_the_probes_that_both_have_are_compared_where_one_has_more() -> None:
    few, many = report_of(BEFORE, num_probes=12), report_of(AFTER, num_probes=40)
    by, exact = of(few, many)["trace"], AFTER.trace - BEFORE.trace
    # The two draw probe i from one stream, as hessfn does from (seed, i).
    assert by[:2] == pytest.approx(of(few, report_of(AFTER, num_probes=12))["trace"][:2])
    assert abs(by.mean - exact) <= 4 * by.stderr
    for report in (few, many):
        del report["samples"]["plain"]
    d = np.array(many["samples"]["trace"][:12]) - few["samples"]["trace"]
    by = of(few, many)["trace"]
    assert (by.mean, by.stderr) == pytest.approx((d.mean(), d.std(ddof=1) / 12**0.5))


def test_control_variates_that_are_other_ones_do_not_hide_a_difference() -> None:
    """Two reports whose pairs are not the same: their samples, paired as they are, err by what the two leave over."""
    a, b = (report_of(BEFORE, num_probes=40, num_pairs=num) for num in (2, 6))
    b_later = report_of(truth(THETA + 0.001 * THETA.new_tensor(STEP)), num_probes=40, num_pairs=6)
    d = np.array(b_later["samples"]["trace"]) - a["samples"]["trace"]
    by = of(a, b_later)["trace"]
    assert by.stderr < d.std(ddof=1) / 40**0.5 / 5
    assert of(a, b)["trace"].stderr < 1e-9
    assert not of(a, b)["trace"].differs


def test_a_difference_counts_in_units_of_the_combined_error() -> None:
    a, b = Measured(9.0, 0.3), Measured(10.0, 0.4)
    by = difference(a, b, Shared(), num_probes=100, num_batches=4)
    assert (by.mean, by.stderr, by.units) == pytest.approx((1.0, 0.5, 2.0))
    assert by.differs  # Student's t of 99 degrees of freedom: 1.98
    assert by.generalizes is None
    assert not difference(a, b, Shared(), num_probes=10, num_batches=4).differs  # of 9: 2.26
    assert not difference(a, b, Shared(), num_probes=100, num_batches=4, comparisons=3).differs
    assert not difference(a, b._replace(bound=0.1), Shared(), num_probes=100, num_batches=4).differs
    unknown = difference(a, b._replace(stderr=math.nan), Shared(), num_probes=100, num_batches=4)
    assert math.isnan(unknown.units) and not unknown.differs


def test_an_error_of_the_data_can_take_a_difference_back() -> None:
    a, b = Measured(9.0, 0.1, 0.0, 0.3), Measured(10.0, 0.1, 0.0, 0.4)
    here = difference(a, b, Shared(), num_probes=100, num_batches=20)
    assert (here.differs, here.generalizes, here.data_stderr) == (True, False, pytest.approx(0.5))
    batches = [8.0, 9.0, 10.0, 9.0] * 3, [9.0, 10.1, 10.9, 10.0] * 3
    close = Shared(batches=batches, weights=[1.0] * 12)
    paired = difference(a, b, close, num_probes=100, num_batches=20)
    assert paired.data_stderr < 0.1 and paired.generalizes


def test_eigenvalues_differ_where_their_bounds_cannot_meet() -> None:
    moved = changed(REPORT, eigenvalues=[x + 3e-6 for x in REPORT["eigenvalues"]])
    assert all(by.differs for by in of(REPORT, moved)["eigenvalues"])
    rounded = changed(moved, rounding=[2e-6] * 3)
    assert not any(by.differs for by in of(REPORT, rounded)["eigenvalues"])
    assert of(REPORT, changed(moved, settings__which="SA"))["eigenvalues"] == []


def test_page_and_summary_have_the_sharpness_of_both() -> None:
    result = of(REPORT, report_of(AFTER))
    assert result["sharpness"].mean == pytest.approx(AFTER.sharpness - BEFORE.sharpness, abs=1e-9)
    (line,) = [line for line in summary(result).splitlines() if line.startswith("sharpness")]
    assert f"{BEFORE.sharpness:.5g}" in line and f"{AFTER.sharpness:.5g}" in line and "differ" in line


def test_page_sets_nets_side_by_side(tmp_path: Path) -> None:
    layers = {"</script><b>": REPORT["layers"]["0.bias"], "2.bias": REPORT["layers"]["2.bias"]}
    a = written(tmp_path / "a", changed(REPORT, settings__problem="<i>"))
    b = written(tmp_path / "b", changed(REPORT, layers=layers, samples=None, settings__seed=7, trace__mean=19.0))
    result = compare(a, b, out=tmp_path / "new" / "page.html")
    text = (tmp_path / "new" / "page.html").read_text()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["page.html"]
    parsed_page, shown = Parsed(text), " ".join(Parsed(text).shown.split())
    assert result["only"] == {"A": ["0.weight", "0.bias", "2.weight"], "B": ["</script><b>"]}
    for words in ("</script><b>", "<i>", "differ here", "only in A", "only in B", "seed 0 7", "Sharpness"):
        assert words in shown
    assert "<b>" not in text and "<i>" not in text
    assert [one["name"] for one in json.loads(parsed_page.scripts["charts"])["spectrum"]["curves"]] == ["A", "B"]
    assert all(link.startswith(("data:", "#")) for link in parsed_page.links)
    assert all(image["alt"] for image in parsed_page.images)
    assert len(text) < 1.5e6


def test_layers_are_pairs_of_bars(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a", REPORT), written(tmp_path / "b", report_of(AFTER))
    compare(a, b, out=tmp_path / "page.html")
    rects = [attrs["class"] for tag, attrs in Parsed((tmp_path / "page.html").read_text()).tags if tag == "rect"]
    assert rects == ["first", "second"] * (len(REPORT["layers"]) + len(REPORT["activations"]))


@pytest.mark.slow
def test_more_than_two_reports_are_a_line_over_training(tmp_path: Path) -> None:
    nets = [truth(trained(num)) for num in (40, 80, 120, 160)]
    folders = [written(tmp_path / f"step{i}", report_of(net)) for i, net in enumerate(nets)]
    result = compare(*folders, out=tmp_path / "page.html")
    charts = json.loads(Parsed((tmp_path / "page.html").read_text()).scripts["charts"])["training"]
    assert charts["names"] == ["A", "B", "C", "D"]
    drawn = {panel["title"]: panel["values"] for panel in charts["panels"]}
    assert drawn["sharpness"] == pytest.approx([net.sharpness for net in nets], rel=1e-5)
    assert drawn["loss"] == pytest.approx([net.losses.mean() for net in nets], rel=1e-5)
    assert sum(step["sharpness"].mean for step in result["steps"]) == pytest.approx(result["sharpness"].mean)
    lines = summary(result).splitlines()
    assert sum(line.startswith(("A  ", "B  ", "C  ", "D  ")) for line in lines) == 8
    assert max(map(len, lines)) <= 80


def test_the_page_may_be_named_last(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a", REPORT), written(tmp_path / "b", REPORT)
    compare(a, b, tmp_path / "page.html")
    assert (tmp_path / "page.html").exists()
    with pytest.raises(InvalidInput, match="at least two reports, not 1"):
        compare(a, out=tmp_path / "page.html")


def test_activations_are_compared_where_both_have_them() -> None:
    more = changed(REPORT, activations__0__trace=4.0, activations__0__stderr=0.1)
    found = of(REPORT, more)["activations"]
    assert {name: (by.mean, by.differs) for name, by in found.items()} == {"0": (1.0, True), "2": (0.0, False)}
    assert "1 of 2 layers that both have differ in the trace of what enters" in summary(of(REPORT, more))
    assert of(REPORT, changed(REPORT, activations=None))["activations"] == {}


def test_summary_fits_a_terminal() -> None:
    a = changed(REPORT, eigenvalues=[-1.23456789e-12, 4.0, 1e9], **{"layers__a\x1b[31m": REPORT["layers"]["0.bias"]})
    b = changed(a, trace__mean=-1e7, trace__stderr=123.4, loss=1e-30, samples=None, sharpness=None)
    sides = [Side("very/" * 30, parsed(a)), Side("b", parsed(b))]
    lines = summary(compared(sides)).splitlines()
    assert max(map(len, lines)) <= 80
    assert "".join(lines).isprintable()
