"""Make trained transformers smaller without retraining, export them, and measure how much faster they got.

    import optin_deploy

    network = optin_deploy.load_network("deit_small")
    calibration = optin_deploy.load_calibration(network, Path("photos"))
    pruned = optin_deploy.prune(network, calibration.batches, flops=0.5)
    optin_deploy.save(pruned.network, pruned.plan, Path("half"))
    module = optin_deploy.load("half")                      # a plain nn.Module
    optin_deploy.export_onnx(pruned.network, "half.onnx")   # checked against torch
    optin_deploy.compare(network, pruned.network)           # measured here

The names below are imported when they are first used, so that ``import optin_deploy`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optin_deploy.api import EngineConfig as EngineConfig
    from optin_deploy.api import build_engine as build_engine
    from optin_deploy.api import compare as compare
    from optin_deploy.api import export_onnx as export_onnx
    from optin_deploy.api import plan as plan
    from optin_deploy.api import profile as profile
    from optin_deploy.api import prune as prune
    from optin_deploy.api import score as score
    from optin_deploy.api_results import Compared as Compared
    from optin_deploy.api_results import EngineFile as EngineFile
    from optin_deploy.api_results import OnnxFile as OnnxFile
    from optin_deploy.api_results import Scores as Scores
    from optin_deploy.config.recipe import Recipe as Recipe
    from optin_deploy.criteria.scoring import Scoring as Scoring
    from optin_deploy.data.calibration import Calibration as Calibration
    from optin_deploy.data.calibration import from_batches as from_batches
    from optin_deploy.data.calibration import load_calibration as load_calibration
    from optin_deploy.data.preprocessing import ImagePreprocessing as ImagePreprocessing
    from optin_deploy.data.preprocessing import TextPreprocessing as TextPreprocessing
    from optin_deploy.errors import GateError as GateError
    from optin_deploy.errors import UserError as UserError
    from optin_deploy.models.checkpoint import load as load
    from optin_deploy.models.checkpoint import save as save
    from optin_deploy.models.custom import custom_network as custom_network
    from optin_deploy.models.load import load_network as load_network
    from optin_deploy.network import Network as Network
    from optin_deploy.pruning.pruner import Pruned as Pruned
    from optin_deploy.report import Report as Report
    from optin_deploy.run.pipeline import prune_export as prune_export
    from optin_deploy.structure.plan import Plan as Plan
    from optin_deploy.sweeps.run import sweep as sweep
    from optin_deploy.sweeps.schema import SweepReport as SweepReport

_HOMES = {
    "Calibration": "data.calibration",
    "Compared": "api_results",
    "EngineConfig": "api",
    "EngineFile": "api_results",
    "GateError": "errors",
    "ImagePreprocessing": "data.preprocessing",
    "Network": "network",
    "OnnxFile": "api_results",
    "Plan": "structure.plan",
    "Pruned": "pruning.pruner",
    "Recipe": "config.recipe",
    "Report": "report",
    "Scores": "api_results",
    "Scoring": "criteria.scoring",
    "SweepReport": "sweeps.schema",
    "TextPreprocessing": "data.preprocessing",
    "UserError": "errors",
    "build_engine": "api",
    "compare": "api",
    "custom_network": "models.custom",
    "export_onnx": "api",
    "from_batches": "data.calibration",
    "load": "models.checkpoint",
    "load_calibration": "data.calibration",
    "load_network": "models.load",
    "plan": "api",
    "profile": "api",
    "prune": "api",
    "prune_export": "run.pipeline",
    "save": "models.checkpoint",
    "score": "api",
    "sweep": "sweeps.run",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'optin_deploy' has no attribute {name!r}")
    return getattr(import_module(f"optin_deploy.{_HOMES[name]}"), name)
