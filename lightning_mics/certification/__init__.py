"""Certification: does a module train right under a schedule of communication? See :func:`certify`.

::

    certify        module, batches, options of the job
      bench          its trainings, one after the other
      scaling        the job's groups on a few ranks            shrinking    a module that a laptop can train
      ranks          forked processes                           training     what each of them runs
      recorder       what is compared, and when                 differences  how much may differ
      report         the table, its reasons, JSON
"""

from lightning_mics.certification.certify import certify
from lightning_mics.certification.report import CertifyReport, NotCertifiedError

__all__ = ["CertifyReport", "NotCertifiedError", "certify"]
