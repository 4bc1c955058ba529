"""A run as its parts see it: context, schedule, ranks, log and messages."""
