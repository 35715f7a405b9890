"""Training in several processes: starting them as one job, adding up what they see, saving what each has."""
