"""Batches: requests that are stored on disk and answered by the slots that live requests leave."""
