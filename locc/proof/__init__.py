"""Proves a program local: three independent checks, and a certificate of what they saw."""

from locc.facts import Certificate, CheckRun, Flow, ObjectiveFacts, OwnerFacts, TableRow
from locc.proof.findings import Finding
from locc.proof.prover import prove, verify

__all__ = [
    "Certificate",
    "CheckRun",
    "Finding",
    "Flow",
    "ObjectiveFacts",
    "OwnerFacts",
    "TableRow",
    "prove",
    "verify",
]
