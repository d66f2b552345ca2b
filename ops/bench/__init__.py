"""The benchmarks: what FedMoE does in a second, beside what Redis, memory, HTTP and Flower do in the same second.

    bash ops/bench.sh --quick --out bench.json

Every contestant is a set of real processes over loopback TCP, with three clients that push and pull. Contestants that
are compared take turns in one run, a few seconds each, so that what else the machine does hits all alike; a ratio is
the median of the ratios of the single rounds. Nothing here is asserted: these are numbers, the tests are elsewhere.

    result      a figure with its bar, the table, the JSON
    processes   starting, watching and ending processes; their CPU time and memory
    contest     clients that go and pause together; rounds in which contestants take turns
    adapters    layouts of real adapters, from 64 KiB to 34 MiB
    fedmoe_side, raw_side, http_side    the contestants: processes and clients
    throughput, latency, overlap, growth, wire, machine, turns, size, quality, tls    the benchmarks
    cluster     three masters and three aggregators, beside one and one
    before      the release before as a contestant; release: what runs in its environment
    race        to a loss, beside Flower: race_fedmoe, race_flower, race_seat (what a client has)
    learning    what gateways are worth that are trained, merged, or trained centrally
"""
