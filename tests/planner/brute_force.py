"""Every assignment of a small problem, costed with its own few lines: the reference the planner is held against.

Written from the contract of `problem.json` alone; shares no code with `ds_llmpq.planner`.
"""

import itertools
import math


def brute_force(problem: dict):
    """(objective, tie) of the best plan of the parsed JSON object, or None when no plan exists."""
    best = None
    names = range(len(problem["devices"]))
    for eta, xi in itertools.product(problem["micro_batches"]["prefill"], problem["micro_batches"]["decode"]):
        for count in range(1, min(len(names), problem["layers"]) + 1):
            for order in itertools.permutations(names, count):
                if problem.get("device_order") == "fixed" and list(order) != sorted(order):
                    continue
                for value in _all_bits(problem, eta, xi, order):
                    if best is None or value < best:
                        best = value
    return best


def _all_bits(problem, eta, xi, order):
    """Values of all feasible cuts and widths for one order; stages are enumerated apart, then combined."""
    layers = problem["layers"]
    for cuts in itertools.combinations(range(1, layers), len(order) - 1):
        bounds = [0, *cuts, layers]
        options = [_stage_options(problem, eta, xi, d, bounds[j], bounds[j + 1]) for j, d in enumerate(order)]
        for stages in itertools.product(*options):
            value = _value(problem, eta, xi, order, stages)
            if value is not None:
                yield value


def _stage_options(problem, eta, xi, d, first, last):
    """Distinct (P, D, sensitivity) of all feasible width choices of one stage."""
    device = problem["devices"][d]
    kind, memory = problem["device_types"][device["type"]], problem["memory"]
    is_first, is_last = first == 0, last == problem["layers"]
    need = max(memory["workspace_bytes"]["prefill"][str(eta)], memory["workspace_bytes"]["decode"][str(xi)])
    need += memory["kv_bytes_per_sequence_layer"] * problem["workload"]["sequences"] * (last - first)
    need += memory["embed_bytes"] if is_first else 0
    need += memory["head_bytes"] if is_last and not (memory["tied_head"] and is_first) else 0
    found = set()
    for bits in itertools.product(kind["bits"], repeat=last - first):
        seconds = []
        for phase, size in (("prefill", eta), ("decode", xi)):
            times = [kind[f"{phase}_layer_seconds"].get(str(b), {}).get(str(size)) for b in bits]
            times += [kind[f"{phase}_embed_seconds"].get(str(size))] if is_first else []
            times += [kind[f"{phase}_head_seconds"].get(str(size))] if is_last else []
            is_only = is_first and is_last
            share = kind.get(f"{phase}_alone_share", 1.0) if is_only else 1.0
            spared = 2 * kind.get("contention_seconds", 0.0) if is_only else 0.0
            seconds.append(math.inf if None in times else share * (sum(times) - spared))
        weights = 0
        for i, b in zip(range(first, last), bits, strict=True):
            entry = memory["layer_bytes"][str(b)]
            weights += entry[i] if isinstance(entry, list) else entry
        if weights + need <= device["memory_bytes"] and math.isfinite(sum(seconds)):
            columns = [problem["bits"].index(b) for b in bits]
            loss = sum(problem["sensitivity"][i][j] for i, j in zip(range(first, last), columns, strict=True))
            found.add((*seconds, loss))
    return _undominated(found)


def _undominated(options):
    """Costs never fall when P, D or sensitivity grows, so dominated options can go."""
    return [a for a in options if not any(b != a and all(y <= x for x, y in zip(a, b, strict=True)) for b in options)]


def _value(problem, eta, xi, order, stages):
    names = [problem["devices"][d]["name"] for d in order]
    work, links = problem["workload"], problem["links"]
    prefill, decode = [stage[0] for stage in stages], [stage[1] for stage in stages]
    loss = sum(stage[2] for stage in stages)
    link_p, link_d = [0], [0]
    if len(names) > 1:
        hidden, token = links["hidden_bytes_per_token"], links["token_bytes"]
        hops = [*itertools.pairwise(names), (names[-1], names[0])]
        last = len(hops) - 1
        link_p = [_link(links, a, b, eta * (token if j == last else hidden * work["prompt_tokens"])) for j, (a, b) in enumerate(hops)]  # fmt: skip  # noqa: E501
        link_d = [_link(links, a, b, xi * (token if j == last else hidden)) for j, (a, b) in enumerate(hops)]
    m_p, m_d = math.ceil(work["sequences"] / eta), math.ceil(work["sequences"] / xi)
    latency = sum(prefill) + sum(link_p) + (m_p - 1) * max(prefill + link_p)
    latency += (work["generated_tokens"] - 1) * max(m_d * max(decode + link_d), sum(decode) + sum(link_d))
    objective = problem["objective"]
    if objective["mode"] == "theta":
        return (latency + objective["theta"] * loss, latency)
    if objective["mode"] == "max_quality_loss":
        return (latency + objective.get("theta", 0.0) * loss, loss) if loss <= objective["limit"] else None
    return (loss, latency) if latency <= objective["limit"] else None


def _link(links, sender, receiver, size):
    link = links["default"]
    for pair in links["pairs"]:
        if (pair["from"], pair["to"]) == (sender, receiver):
            link = pair
    return link["latency_seconds"] + size * link["seconds_per_byte"]
