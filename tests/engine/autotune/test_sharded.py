"""The dry run of sharded layers: how a policy shrinks that does not fit every process."""

from types import SimpleNamespace

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.engine.autotune.sharded import smaller_policy

WORK = SimpleNamespace(max_length=4096, longest=1000)


def test_a_policy_shrinks_by_feed_forwards_then_layers_then_micro_batches():
    policy, seen = MemoryPolicy(recompute_mlp_layers=5), []
    while (policy := smaller_policy(policy, 16, WORK)) is not None:
        seen.append((policy.recompute_layers, policy.recompute_mlp_layers, policy.micro_tokens))
        assert not policy.offloaded_layers
    assert seen[:6] == [(0, mlp, None) for mlp in (7, 9, 11, 13, 15, 16)]
    assert seen[6:14] == [(whole, 16 - whole, None) for whole in range(2, 17, 2)]
    assert seen[14:] == [(16, 0, 2048), (16, 0, 1024), (16, 0, 1000)]
