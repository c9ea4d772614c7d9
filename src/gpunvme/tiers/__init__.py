"""Files on tiers of storage: where each lives, how often it is read, and its way from one tier to another."""

from gpunvme.tiers.policy import Policy
from gpunvme.tiers.rebuild import Rebuilt, rebuild
from gpunvme.tiers.rounds import Decision
from gpunvme.tiers.status import FileStatus, Status, TierStatus
from gpunvme.tiers.store import TierManager

__all__ = ["Decision", "FileStatus", "Policy", "Rebuilt", "Status", "TierManager", "TierStatus", "rebuild"]
