"""Behaviour: actor and critic, learned on trajectories imagined in the world model."""
