"""Errors that the user can act on: one sentence that says what is wrong, where, and what to do."""


class MituneError(ValueError):
    """Bad input or settings. The command line prints the sentence and exits with status 2."""


class GuidanceError(MituneError):
    """The pipeline ran without an unconditional pass, so there is nothing to hold the prompt against."""


class ModelError(MituneError):
    """The model does not exist, is no diffusers pipeline, or is of a kind that mitune cannot score."""
