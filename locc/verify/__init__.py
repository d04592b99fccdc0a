"""Proves a program local: three independent checks, and a certificate of what they saw.

`locc.verify` is the function of that name; everything else here is imported with
`from locc.verify import ...`, and is an attribute of the function as well.
"""

from locc.facts import Certificate, CheckRun, Flow, ObjectiveFacts, OwnerFacts, TableRow
from locc.verify.findings import Finding
from locc.verify.prover import prove, verify

# `import locc.verify as v` yields what the package's attribute is: the function.
vars(verify).update(
    Certificate=Certificate,
    CheckRun=CheckRun,
    Finding=Finding,
    Flow=Flow,
    ObjectiveFacts=ObjectiveFacts,
    OwnerFacts=OwnerFacts,
    TableRow=TableRow,
    prove=prove,
    verify=verify,
)

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
