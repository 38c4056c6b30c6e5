"""ResNet20 on CIFAR-10, really trained: needs the folder of weights and images beside the repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_distributed import pytestmark as no_processes
from test_distributed import run, same_bits

import hessfn as hf
from hessfn import problems
from hessfn.core import tree

DATA = Path(os.environ.get("HESSFN_DATA", Path(__file__).parents[2] / "shared" / "data"))
FILES = {"weights": DATA / "resnet20_cifar10_trained.pth", "data": DATA / "cifar10_train_first4000.npz"}
pytestmark = [
    pytest.mark.skipif(not all(map(Path.is_file, FILES.values())), reason=f"no weights and images in {DATA}"),
    pytest.mark.timeout(900),  # the net is real, and the machine may be busy
]


def resnet20(num_images, dtype=torch.float32):
    model, criterion, batches = problems.cifar10_resnet20(**FILES, num_images=num_images, batch_size=num_images)
    loss, params = hf.functionalize(model.to(dtype), criterion)
    return loss, params, (batches[0][0].to(dtype), batches[0][1]), model


@pytest.fixture
def all_cores():
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
def test_top_eigenvalues_and_trace():
    loss, params, batch, _ = resnet20(200)
    matvec = hf.linearized_hvp(loss, params, batch)
    eig = hf.eigsh(matvec, hf.gaussian(params, 1, seed=0)[0], k=5)
    assert eig.num_matvecs <= 20
    assert torch.allclose(eig.values, torch.tensor([56.632, 22.729, 14.616, 11.467, 5.277]).double(), rtol=1e-3)
    assert (eig.residuals <= 1e-3 * eig.values).all()
    trace = hf.deflated_trace(matvec, hf.rademacher(params, 26), eig)
    assert eig.num_matvecs + trace.num_matvecs <= 60
    assert trace.stderr <= 0.02 * trace.mean
    assert abs(trace.mean - 142.2) <= 4 * trace.stderr


@pytest.mark.usefixtures("all_cores")
def test_products_agree_with_double_backward_in_float32():
    loss, params, batch, model = resnet20(32)
    v = hf.gaussian(params, 1)[0]
    exact = hf.hvp(loss, params, batch, mode="double_backward")(v)
    for matvec in (hf.hvp(loss, params, batch), hf.linearized_hvp(loss, params, batch)):
        assert tree.norm(tree.add(matvec(v), exact, -1.0)) <= 1e-3 * tree.norm(exact)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.slow
def test_sketches_and_functions_of_the_spectrum_agree_on_the_trace():
    loss, params, (x, y), model = resnet20(200)
    with torch.no_grad():
        worst = torch.nn.functional.cross_entropy(model(x), y, reduction="none").topk(5).indices
    matvec, n = hf.linearized_hvp(loss, params, (x[worst], y[worst])), tree.numel(params)
    eig = hf.eigsh(matvec, hf.gaussian(params, 1)[0], k=4, rtol=1e-2)
    trace = hf.deflated_trace(matvec, hf.rademacher(params, 16, seed=1), eig)
    diagonal = hf.xdiag(matvec, hf.rademacher(params, 6, seed=2))
    probe = hf.gaussian(params, 1, seed=3)
    rayleigh = tree.dot(probe[0], matvec(probe[0])) / tree.dot(probe[0], probe[0])
    first_moment = hf.trace_of(hf.slq(matvec, probe, 8), lambda x: x, n).mean
    assert torch.allclose(first_moment, n * rayleigh, rtol=1e-4)
    for estimate in (
        hf.hutchpp(matvec, hf.rademacher(params, 12, seed=4)),
        hf.xtrace(matvec, hf.gaussian(params, 8, seed=5)),
    ):
        assert abs(estimate.mean - trace.mean) <= 5 * torch.hypot(estimate.stderr, trace.stderr)
    sum_of_diagonal = tree.dot(diagonal.mean, tree.map(torch.ones_like, params))
    assert abs(sum_of_diagonal - trace.mean) <= 0.3 * trace.mean  # its error is known entry by entry only


@pytest.mark.slow
def test_gauss_newton_and_fisher_are_what_they_are_made_of():
    _, params, (x, y), model = resnet20(10, torch.float64)  # so sure a net has differences of like numbers
    forward, criterion, v = hf.stateless(model)[0], torch.nn.CrossEntropyLoss(), hf.gaussian(params, 1)[0]
    outputs, change = torch.func.jvp(lambda p: forward(p, x), (params,), (v,))
    p = outputs.softmax(1)
    curvature = ((p * change.square()).sum(1) - (p * change).sum(1).square()).mean()
    slopes = change.gather(1, y[:, None])[:, 0] - (p * change).sum(1)  # of the log-likelihoods
    for make, expected in ((hf.ggnvp, curvature), (hf.fvp, slopes.square().mean())):
        matvec = make(forward, criterion, params, (x, y))
        assert torch.allclose(tree.dot(v, matvec(v)), expected, rtol=1e-8)
        hf.check_matvec(matvec, params)


@pytest.mark.slow
def test_what_shares_its_probes_agrees_and_parts_make_the_whole():
    loss, params, (x, y), _ = resnet20(10, torch.float64)
    matvec, probes = hf.hvp(loss, params, (x, y)), hf.rademacher(params, 3)
    v = hf.gaussian(params, 1)[0]
    whole, uneven = matvec(v), hf.mean_hvp(loss, params, [(x[:7], y[:7]), (x[7:], y[7:])])(v)
    assert tree.norm(tree.add(uneven, whole, -1.0)) <= 1e-8 * tree.norm(whole)
    name = "features.stage2.unit1.body.conv1.conv.weight"
    alone = hf.restrict(matvec, params, name)({name: v[name]})[name]
    only = {key: z if key == name else torch.zeros_like(z) for key, z in v.items()}
    assert tree.norm(alone - matvec(only)[name]) <= 1e-5 * tree.norm(alone)
    trace, layers = hf.hutchinson(matvec, probes), hf.hutchinson_per_leaf(matvec, probes)
    diagonal = hf.hutchinson_diag(matvec, probes)
    ones = tree.map(torch.ones_like, params)
    assert torch.allclose(torch.stack(list(layers.mean.values())).sum(), trace.mean, rtol=1e-4)
    assert torch.allclose(tree.dot(diagonal.mean, ones), trace.mean, rtol=1e-4)
    assert torch.allclose(hf.mean_traces(layers, params).mean[name] * params[name].numel(), layers.mean[name])
    rows, square = hf.squared_row_norms(matvec, probes), hf.squared_frobenius(matvec, probes)
    assert torch.allclose(tree.dot(rows.mean, tree.map(tree.wide, ones)), square.mean, rtol=1e-4)
    tridiagonal = hf.lanczos(matvec, v, 4)
    assert torch.allclose(tridiagonal.alpha[0], tree.dot(v, whole) / tree.dot(v, v), rtol=1e-3, atol=1e-6)


def shared_and_kept(rank, size, folder):
    loss, params, (x, y), _ = resnet20(5, torch.float64)
    mine, v = ((x[:2], y[:2]) if rank == 0 else (x[2:], y[2:])), hf.gaussian(params, 1)[0]

    def mean_of(matvec):
        kept = hf.journal(matvec, folder / f"products{rank}", key={"params": params, "data": mine})
        return hf.all_reduce(kept, len(mine[0]))

    product, read = (mean_of(make)(v) for make in (hf.hvp(loss, params, mine, mode="forward"), lambda v: 1 / 0))
    assert same_bits(product) and all(torch.equal(read[name], product[name]) for name in params)
    if rank == 0:
        whole = hf.hvp(loss, params, (x, y), mode="forward")(v)
        assert tree.norm(tree.add(product, whole, -1.0)) <= 1e-8 * tree.norm(whole)


@pytest.mark.slow
@no_processes
def test_two_processes_share_the_images_and_read_their_products_again(tmp_path):
    run(shared_and_kept, 2, tmp_path)


MEMORY = r"""
import re, sys
sys.path.insert(0, {folder!r})
from test_real_net import hf, resnet20
loss, params, batch, _ = resnet20(16)
matvec = hf.hvp(loss, params, batch)
peaks = []
for count in (5, 45):
    for v in hf.gaussian(params, count):
        matvec(v)
    status = open('/proc/self/status').read()  # not ru_maxrss, which a process has from its parent
    peaks.append(re.search(r'VmHWM:\s+(\d+)', status).group(1))
print(*peaks)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
def test_memory_is_flat():
    script = MEMORY.format(folder=str(Path(__file__).parent))
    # Every tensor in memory of its own: else the holes between blocks of the heap would be measured along.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    after_5, after_50 = map(int, done.stdout.split())
    assert after_50 <= 1.01 * after_5
