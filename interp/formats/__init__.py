"""Other people's data sets, read in their native formats into ConflictSets.

A format is a name, the fields that its rows need, and a reader: a function from one row to its items, one file a
format. An item is a question with its contexts; it becomes one example for each context and one without (``none``).
``load_dataset`` takes the rows from JSON, JSON lines, CSV, TSV or Parquet files, ``convert_dataset`` writes their
examples to a file as they come; both name file, place and field where a row cannot be read, and leave out, and count,
what could not be measured:

- items whose conflict context gives an answer of memory: whichever an answer used, it would count as both,
- items whose answer a prompt gives away without a context, where the format's reader says so (``Item.unusable``),
- exact copies of an earlier item.
"""

from interp.formats.items import Context, Format, Item
from interp.formats.known import FORMATS, format_names
from interp.formats.loading import Converted, Loaded, convert_dataset, load_dataset
from interp.formats.row import Row

__all__ = [
    "FORMATS",
    "Context",
    "Converted",
    "Format",
    "Item",
    "Loaded",
    "Row",
    "convert_dataset",
    "format_names",
    "load_dataset",
]
