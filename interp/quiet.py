"""Keep transformers from talking where we do."""

from __future__ import annotations


class quiet_transformers:
    """Silences transformers' progress bars and advice while we show our own."""

    def __enter__(self) -> None:
        from transformers.utils import logging as transformers_logging

        self._verbosity = transformers_logging.get_verbosity()
        self._bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity(self._verbosity)
        if self._bars:
            transformers_logging.enable_progress_bar()
