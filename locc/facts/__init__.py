"""What follows from a training graph alone, and the certificate that states it.

`derive` finds what each value is made of; `traffic`, `locking` and `critical` read their facts off that.
Nothing here runs a step: what the checks of `locc.proof` saw is added by them.
"""

from locc.facts.certificate import Certificate, graph_hash, graph_text
from locc.facts.derive import derive
from locc.facts.locking import NOT, STRICT, WEAK, Locking
from locc.facts.records import CheckRun, Memory, ObjectiveFacts, OwnerFacts, TableRow
from locc.facts.traffic import Flow

__all__ = [
    "NOT",
    "STRICT",
    "WEAK",
    "Certificate",
    "CheckRun",
    "Flow",
    "Locking",
    "Memory",
    "ObjectiveFacts",
    "OwnerFacts",
    "TableRow",
    "derive",
    "graph_hash",
    "graph_text",
]
