"""Forward and backward of one signature of the batch."""
