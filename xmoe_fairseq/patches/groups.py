"""The groups of patches, in the order in which they are installed and listed."""

from . import (
    averages,
    commands,
    decoding,
    distributed,
    language_models,
    numpy_names,
    options,
    reading,
    resuming,
    saving,
    training,
)

ON_IMPORT = (
    reading.GROUP,
    saving.GROUP,
    resuming.GROUP,
    averages.GROUP,
    options.GROUP,
    training.GROUP,
    distributed.GROUP,
    decoding.GROUP,
    commands.GROUP,
    numpy_names.GROUP,
    language_models.GROUP,
)
ALL = (*ON_IMPORT, commands.INTERACTIVE, commands.GENERATE)
