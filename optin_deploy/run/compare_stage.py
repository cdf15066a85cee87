"""The stages of a run that compare the outputs of both networks, in float32."""

from dataclasses import dataclass

from optin_deploy.evaluation.agreement import agreement
from optin_deploy.evaluation.dataset import Dataset
from optin_deploy.evaluation.example_images import draw_examples
from optin_deploy.evaluation.results import Agreement, ExampleImage
from optin_deploy.network import Network
from optin_deploy.report.schema import VARIANTS, Evaluation
from optin_deploy.run.context import RunContext
from optin_deploy.run.run_directory import load_or_compute
from optin_deploy.utils.progress import track


@dataclass(frozen=True)
class OutputResults:
    """Agreement of the outputs on held-out inputs, and the metric on labelled data if the recipe names some."""

    agreement: list[Agreement]
    pictures: list[ExampleImage]
    evaluation: Evaluation | None


def compare_outputs(context: RunContext, pruned: Network) -> OutputResults:
    """Compare the outputs of the dense and the pruned network."""
    directory, dataset = context.directory, context.prepared.dataset
    with context.stages.stage("compare outputs"):
        agreements = load_or_compute(directory / "agreement.json", list[Agreement], _agreement, context, pruned)
        images = load_or_compute(directory / "pictures.json", list[ExampleImage], _draw, context, pruned)
    if dataset is None:
        return OutputResults(agreements, images, None)
    with context.stages.stage("evaluate"):
        path = directory / "evaluation.json"
        evaluation = load_or_compute(path, Evaluation, _evaluate, context, pruned, dataset)
    return OutputResults(agreements, images, evaluation)


def _agreement(context: RunContext, pruned: Network) -> list[Agreement]:
    """Return the agreement of every output, and of the sentence embeddings if the model says how they are made."""
    dense, held_out = context.network, context.prepared.calibration.held_out
    outputs = [*agreement(dense, pruned.module, held_out)]
    return outputs if dense.sentences is None else [*outputs, *agreement(dense.with_pooling(), pruned.module, held_out)]


def _draw(context: RunContext, pruned: Network) -> list[ExampleImage]:
    return draw_examples(context.network, pruned.module, context.prepared.calibration.held_out)


def _evaluate(context: RunContext, pruned: Network, dataset: Dataset) -> Evaluation:
    figures = {}
    for name, network in track([*zip(VARIANTS, (context.network, pruned), strict=True)]):
        figures[name] = dataset.measure(network.module.to(context.prepared.device))
        network.module.cpu()
    return Evaluation(metric=dataset.metric, dataset=dataset.name, samples=dataset.samples, **figures)
