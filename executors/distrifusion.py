"""DistriFusion: displaced patch parallelism (arXiv 2402.19481; code mit-han-lab/distrifuser).

Every rank denoises a horizontal stripe. After the synchronous steps, self-attention sees the other stripes' keys and
values, and convolutions the neighbours' edge rows, as they were one step ago; they travel while a whole step is
computed. The predicted noise is gathered at the end of every step, so that all ranks hold the same latent.
"""

from __future__ import annotations

from executors.stripes import StripeDenoiser


class DistriFusion(StripeDenoiser):
    """One rank of DistriFusion: self-attention sees the whole image."""
