"""Writes and reads trace files: one Arrow IPC stream, each batch a row of tables; decodes no meaning.

The tables and columns are those of `vmatrace.schema`. Every batch stands alone, so a file that ends anywhere
is readable up to its last complete batch.
"""

from vmatrace.tracefile.layout import END_FIELDS, METADATA_KEY, arrow_schema
from vmatrace.tracefile.reader import Table, TraceFile
from vmatrace.tracefile.writer import TraceWriter

__all__ = ["END_FIELDS", "METADATA_KEY", "Table", "TraceFile", "TraceWriter", "arrow_schema"]
