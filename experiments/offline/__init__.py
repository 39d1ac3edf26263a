"""SFT, then DPO, IPO, SimPO and KTO on the same human preferences from the same model."""
