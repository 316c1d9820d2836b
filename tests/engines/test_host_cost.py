"""The gate on host cost: instructions per additional parameter of a step, counted by callgrind."""

import pytest

from bench import host_cost


@pytest.mark.full("host cost")
@pytest.mark.skipif(host_cost.why_not() is not None, reason=str(host_cost.why_not()))
def test_host_cost_does_not_creep():
    names = (host_cost.BASELINE, host_cost.GATED)
    counts = host_cost.count(names, counts=(10, 100))
    ours = host_cost.per_parameter(counts[host_cost.GATED])
    torchs = host_cost.per_parameter(counts[host_cost.BASELINE])
    assert ours <= host_cost.LIMIT, (
        f"one more parameter costs {ours:,.0f} instructions, the gate is {host_cost.LIMIT:,} "
        f"(torch's fused SGD: {torchs:,.0f}); see python -m bench.host_cost"
    )
