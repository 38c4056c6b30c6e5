"""Graphs of products consist of operations that ``vmap`` has rules for: one that has none would be a loop."""

import pytest
import torch
from nets import classes, normal, seeded
from torch import nn

import hessfn as hf
from hessfn.engine import pipeline
from hessfn.engine.op_definitions import by_definition


def test_copies_of_a_vision_transformer_have_a_rule_under_vmap():
    models = pytest.importorskip("torchvision.models")
    net = seeded(lambda: models.VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=3))
    loss, params = hf.functionalize(net.double().eval(), nn.CrossEntropyLoss())
    batch = normal(2, 3, 8, 8), classes(2, 3)
    job = pipeline.Job(by_definition(loss), params, (batch,))
    graph = pipeline.run(pipeline.LOSS + pipeline.PRODUCT, None, job).graph
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.copy.default)
    matvec, probes = hf.hvp(loss, params, batch, trace_after=0), list(hf.gaussian(params, 2))
    together = torch.func.vmap(matvec)(hf.tree.map(lambda *x: torch.stack(x), *probes))
    for i, v in enumerate(probes):
        for name, x in matvec(v).items():
            assert torch.allclose(together[name][i], x, rtol=1e-10, atol=1e-12)
