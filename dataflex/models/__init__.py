"""Models beside the trainer's loop: passes, frozen references, generation, encoders."""
