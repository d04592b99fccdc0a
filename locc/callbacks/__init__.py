"""What takes part in a fit: `program.fit(loader, callbacks=[...])`."""

from locc.callbacks.bar import ProgressBar
from locc.callbacks.base import Callback, Fit
from locc.callbacks.best import BestCheckpoint, EarlyStopping
from locc.callbacks.logs import CSVLog, TensorBoard

__all__ = ["BestCheckpoint", "CSVLog", "Callback", "EarlyStopping", "Fit", "ProgressBar", "TensorBoard"]
