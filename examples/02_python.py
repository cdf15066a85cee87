"""Score a network once, prune it for two budgets, and compare both with the dense network.

python examples/02_python.py [MODEL]

MODEL is a timm name, a transformers id or a directory (default: deit_small).
"""

import sys

import optin_deploy


def main(model: str = "deit_small", weights: str = "pretrained") -> None:
    """Prune ``model`` to 0.7 and 0.5 of its FLOPs and print how fast each is."""
    network = optin_deploy.load_network(model, weights=weights)
    # Built-in images or sentences; give a path to use your own.
    calibration = optin_deploy.load_calibration(network, samples=64)

    scores = optin_deploy.score(network, calibration.batches)
    for flops in (0.7, 0.5):
        plan = optin_deploy.plan(network, scores, flops=flops)
        pruned = optin_deploy.prune(network, calibration.batches, plan=plan)
        print(pruned)
        print(optin_deploy.compare(network, pruned.network, batch_sizes=(1,), seconds=2.0))


if __name__ == "__main__":
    main(*sys.argv[1:])
