"""Which fit makes the scores of an ingest, and whether it can: found out before any image is read."""

import os

import torch

from schemas.errors import PlanError, StoreMismatchError
from schemas.fits import Fit
from schemas.store import StoreFolder
from workers.models import LoadedModel
from workers.request import Request
from workers.scoring import Scorer
from workers.vit import VitDecomposition


def find_fit(request: Request, folder: StoreFolder | None) -> StoreFolder | None:
    """The store that holds the fit behind the scores that are asked for; a store that has scores has their fit, too.

    Raises:
        PlanError: no fit was named, or one for nothing.
        StoreMismatchError: the scores that are there were made by another.
        SelectionError: the store that was named has none.
    """
    level = request.recipe.level
    if level == "coefficients":
        if request.fit is not None:
            raise PlanError("a fit makes scores of neurons: add --neurons scores, or leave out --fit")
        return None
    if folder is not None:
        name = folder.fit_description(folder.manifest.recipe.fit).name
        if request.fit is not None and request.fit.exists() and name not in StoreFolder.open(request.fit).fit_names():
            raise StoreMismatchError(
                f"the scores in {request.store} were made by the fit {name}, which {request.fit} does not have: "
                "name another store"
            )
        return folder
    if request.fit is None:
        raise PlanError(
            f"neurons can be kept as {level} only by a fit: ingest a sample with coefficients, run "
            "'spectrograph fit' on its store, and name that store with --fit"
        )
    found = StoreFolder.open(request.fit)
    found.fit_description()
    return found


def checked_fit(scoring: StoreFolder, request: Request, loaded: LoadedModel) -> Fit:
    """The fit, if it was made as it is to be used.

    Raises:
        StoreMismatchError: it was made with another model, or in another precision.
    """
    differences = scoring.manifest.model_differences(loaded.fingerprint, loaded.config, loaded.preprocessing)
    here, there = scoring.manifest.recipe.precision, request.recipe.precision
    differences += [f"precision {here} in the store, {there} asked for"] if here != there else []
    if differences:
        raise StoreMismatchError(f"the fit in {scoring.path} was made otherwise: {'; '.join(differences)}")
    return scoring.fit(scoring.manifest.recipe.fit)


def check_scoring(request: Request, decomposition: VitDecomposition, fit: Fit) -> None:
    """Makes sure that the fit has what is asked for, and that there is room for what scoring holds in memory.

    Raises:
        PlanError: it has not, or there is none.
    """
    if lacking := fit.lacks(decomposition.recipe, decomposition.sizes):
        raise PlanError(f"the fit in {request.fit or request.store} has {lacking}")
    held = Scorer.held_bytes(decomposition.sizes, decomposition.recipe)
    there = _memory_bytes(decomposition.vision.conv1.weight.device)
    if held > there / 2 and not request.force:
        raise PlanError(
            f"scoring these layers holds {held / 1e9:.1f} GB in memory, of {there / 1e9:.1f} GB: capture fewer layers "
            "at a time, keep coefficients, or add --force"
        )


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
