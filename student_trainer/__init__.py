"""The trainer: trains a student on the K/V of its teachers (`kvdistill train`)."""
