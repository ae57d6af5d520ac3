"""Write interventions in the forms that other engines load."""
