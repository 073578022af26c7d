"""How good a policy is and how far it drifted: rewards, margins, KL, samples, statistics, findings."""
